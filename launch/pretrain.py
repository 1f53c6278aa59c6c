"""What torchrun, the deepspeed launcher and srun start, one process per rank of the grid.

    torchrun --nproc_per_node 4 launch/pretrain.py --config launch/configs/small.yaml key=value
    deepspeed --num_accelerators 4 --no_local_rank launch/pretrain.py --config ...
    deepspeed --hostfile hosts --no_local_rank launch/pretrain.py --config ...   # several nodes

It is `fedpipe pretrain` in a process that is a rank, and so is `torchrun -m fedpipe pretrain`.
With --cluster it is `fedpipe submit pretrain`, the same run as a job:

    python launch/pretrain.py --cluster slurm --profile slurm/profiles/gpu.yaml --config ...

On one machine `fedpipe pretrain` starts the ranks itself, with a live display and a supervisor.
"""

import sys

from fedpipe.cli import main

if __name__ == "__main__":
    if any(argument.split("=")[0] == "--cluster" for argument in sys.argv):
        sys.exit(main(["submit", "pretrain", *sys.argv[1:]]))
    sys.exit(main(["pretrain", *sys.argv[1:]], launched=True))
