"""What torchrun and the deepspeed launcher start, one process per rank of the grid.

    torchrun --nproc_per_node 4 launch/pretrain.py --config launch/configs/small.yaml key=value
    deepspeed --num_accelerators 4 --no_local_rank launch/pretrain.py --config ...

On one machine `fedpipe pretrain` does the same with a live display and a supervisor.
"""

import sys

from fedpipe.launcher.external import main

if __name__ == "__main__":
    sys.exit(main())
