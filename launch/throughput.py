"""What torchrun, the deepspeed launcher and srun start, one process per rank of the grid.

    torchrun --nproc_per_node 4 launch/throughput.py --config launch/configs/small.yaml key=value
    deepspeed --num_accelerators 4 --no_local_rank launch/throughput.py --config ...
    deepspeed --hostfile hosts --no_local_rank launch/throughput.py --config ...   # several nodes

With --cluster it submits the same measurement as a job instead, and is `fedpipe submit throughput`:

    python launch/throughput.py --cluster slurm --profile slurm/profiles/gpu.yaml --config ...

On one machine `fedpipe throughput` does the same with a live display and a supervisor.
"""

import sys

if __name__ == "__main__":
    if any(argument.split("=")[0] == "--cluster" for argument in sys.argv):
        from fedpipe.cli import main as fedpipe

        sys.exit(fedpipe(["submit", "throughput", *sys.argv[1:]]))
    from fedpipe.cluster.external import main

    sys.exit(main("throughput"))
