"""What torchrun, the deepspeed launcher and srun start, one process per rank of the grid.

    torchrun --nproc_per_node 4 launch/pretrain.py --config launch/configs/small.yaml key=value
    deepspeed --num_accelerators 4 --no_local_rank launch/pretrain.py --config ...
    deepspeed --hostfile hosts --no_local_rank launch/pretrain.py --config ...   # several nodes

With --cluster it submits the same run as a job instead, and is `fedpipe submit pretrain`:

    python launch/pretrain.py --cluster slurm --profile slurm/profiles/gpu.yaml --config ...

On one machine `fedpipe pretrain` does the same with a live display and a supervisor.
"""

import sys

if __name__ == "__main__":
    if any(argument.split("=")[0] == "--cluster" for argument in sys.argv):
        from fedpipe.cli import main as fedpipe

        sys.exit(fedpipe(["submit", "pretrain", *sys.argv[1:]]))
    from fedpipe.cluster.external import main

    sys.exit(main("pretrain"))
