"""``fedpipe plan``: show the plan of a run without starting it."""

from __future__ import annotations

import argparse

from fedpipe.commands import options
from fedpipe.commands.consortium.config import is_consortium, of_a_site
from fedpipe.commands.plan.plan import build_plan, render
from fedpipe.commands.plan.text_facts import render_text, render_uncounted, text_facts
from fedpipe.config.load import load_config
from fedpipe.config.tree import merge, parse, parse_override, read_text
from fedpipe.terminal import show

_OF_ALL_SITES = ("model", "stage", "batch", "site")
"""Lines of a plan that hold for every site of a consortium; the others depend on its clients."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe plan``."""
    options.add_run(command)
    command.add_argument(
        "--measure",
        action="store_true",
        help="measure layers and heads on this machine, and show the cut that balances them",
    )


def run(args: argparse.Namespace) -> int:
    """Show the plan of a configuration, of a site of a consortium, or of a run directory.

    Raises:
        FedPipeError: The configuration cannot work, or, after the plan, its text does not exist.
    """
    source = args.config
    if source and not args.preset:
        tree = parse(read_text(source), source=source)
        if is_consortium(tree):
            for override in args.overrides:
                tree = merge(tree, parse_override(override))
            lines = render(build_plan(of_a_site(tree, source=source))).splitlines()
            show("\n".join(line for line in lines if line.split()[0] in _OF_ALL_SITES))
            return 0
    if args.run_dir and not (args.config or args.preset):
        source = options.existing_run(args, "pretrain").saved
    config = load_config(source, args.overrides, preset=args.preset)
    show(render(build_plan(config)))
    from fedpipe.data.corpus import find_prepared

    data = find_prepared(config)
    show(render_text(text_facts(data), config) if data else render_uncounted())
    if args.measure:
        from fedpipe.commands.plan.cut import choose_cut, measure_here

        choose_cut(config, measure=measure_here, notify=show)
    return 0
