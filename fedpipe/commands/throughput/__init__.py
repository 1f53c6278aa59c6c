"""``fedpipe throughput``: measure schedules side by side."""
