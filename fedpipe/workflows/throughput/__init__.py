"""Throughput: measure schedules side by side, and say what the numbers mean."""
