"""What a run tells about itself: the record, the console and the report.

``metrics.jsonl`` is the truth; everything else is a view of it.
"""
