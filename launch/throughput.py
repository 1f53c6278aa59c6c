"""What torchrun, the deepspeed launcher and srun start, one process per rank of the grid.

    torchrun --nproc_per_node 4 launch/throughput.py --config launch/configs/small.yaml key=value
    deepspeed --num_accelerators 4 --no_local_rank launch/throughput.py --config ...
    deepspeed --hostfile hosts --no_local_rank launch/throughput.py --config ...   # several nodes

It is `fedpipe throughput` in a process that is a rank, and so is `torchrun -m fedpipe throughput`.
With --cluster it is `fedpipe submit throughput`, the same measurement as a job:

    python launch/throughput.py --cluster slurm --profile slurm/profiles/gpu.yaml --config ...

On one machine `fedpipe throughput` starts the ranks itself, with a live display and a supervisor.
"""

import sys

from fedpipe.cli import main

if __name__ == "__main__":
    if any(argument.split("=")[0] == "--cluster" for argument in sys.argv):
        sys.exit(main(["submit", "throughput", *sys.argv[1:]]))
    sys.exit(main(["throughput", *sys.argv[1:]], launched=True))
