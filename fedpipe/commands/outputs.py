"""``fedpipe export`` and ``fedpipe report`` of a run of any kind: pre-trained or fine-tuned."""

from __future__ import annotations

from pathlib import Path


def export(run_dir: Path) -> list[Path]:
    """Write the newest checkpoint of a run as folders that other libraries read; return them."""
    if _is_finetuning(run_dir):
        from fedpipe.commands.finetune.finish import export_finetuned

        return export_finetuned(run_dir)
    from fedpipe.run.export import export_run

    return [export_run(run_dir)]


def report(run_dir: Path) -> Path:
    """Write the report of a run; return its page."""
    if _is_finetuning(run_dir):
        from fedpipe.commands.finetune.report import write_finetune_report

        return write_finetune_report(run_dir)
    from fedpipe.commands.pretrain.report import write_report

    return write_report(run_dir)


def _is_finetuning(run_dir: Path) -> bool:
    """Whether a run's configuration is that of ``fedpipe finetune``."""
    return "\nmethod:" in (run_dir / "config.yaml").read_text(encoding="utf-8")
