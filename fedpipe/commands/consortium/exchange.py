"""How files get from a coordinator to its sites and back: through folders. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from fedpipe.commands.consortium.kits import make_folder
from fedpipe.files import sync, write_atomically, write_text
from fedpipe.run.outer import (
    GLOBAL,
    GLOBAL_FACTS,
    UPDATE,
    UPDATE_FACTS,
    has_arrived,
    round_name,
)

SHARED_FILE = "pretrain.yaml"
"""What a site gives to ``fedpipe pretrain --config``, beside its outer rounds."""


class Exchange(Protocol):
    """Whatever moves the weights to the sites and their updates back."""

    def open(self, settings: dict[str, str]) -> None:
        """Begin, with the YAML of every site's run."""

    def close(self) -> None:
        """End; sites are not told."""

    def hand_out(self, index: int, folder: Path, sites: Sequence[str]) -> None:
        """Let sites begin an outer round whose weights lie in a folder; again changes nothing."""

    def attend(self, waiting: Sequence[str]) -> None:
        """Do what is due while some sites have not answered; called often."""

    def take_in(self, site: str, index: int, folder: Path) -> bool:
        """Bring an update that is not in a folder of ours yet; whether it lies there whole now."""

    def declined(self, site: str, folder: Path) -> str:
        """Why a site sends no update for an outer round; empty where it may still send one."""

    def recall(self) -> None:
        """Tell the sites, where that is possible, that nobody waits for an answer any more."""


class Folders:
    """A folder per site; what brings its files to the site and back is not our concern."""

    def __init__(self, path: Path) -> None:
        """Name the folder that holds the sites' folders."""
        self.path = path

    def open(self, settings: dict[str, str]) -> None:
        """Write what every site's run has in common with the others'."""
        for site, text in settings.items():
            folder = self.path / site
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / SHARED_FILE).is_file():
                write_text(folder / SHARED_FILE, text)

    def close(self) -> None:
        """Do nothing: nothing runs."""

    def _inbox(self, site: str, index: int) -> Path:
        return self.path / site / round_name(index)

    def hand_out(self, index: int, folder: Path, sites: Sequence[str]) -> None:
        """Copy the weights to every site; what says that they are there comes last."""
        for site in sites:
            inbox = self._inbox(site, index)
            make_folder(inbox, key="exchange")
            for name in (GLOBAL, GLOBAL_FACTS):
                if not (inbox / GLOBAL_FACTS).is_file():
                    write_atomically(inbox / name, partial(shutil.copyfile, folder / name))
                    sync(inbox)

    def attend(self, waiting: Sequence[str]) -> None:
        """Do nothing: what moves the files does it."""

    def take_in(self, site: str, index: int, folder: Path) -> bool:
        """Copy an update out of the exchange, which is the site's, into our own folder.

        What moves the two files may bring them in any order, and piece by piece.
        """
        inbox = self._inbox(site, index)
        most = 2 * (folder.parents[1] / GLOBAL).stat().st_size
        if _size(inbox / UPDATE) > most or not has_arrived(inbox):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for name in (UPDATE, UPDATE_FACTS):
            write_atomically(folder / name, partial(shutil.copyfile, inbox / name))
        sync(folder)
        return has_arrived(folder)

    def declined(self, site: str, folder: Path) -> str:
        """Nothing: a folder has no way to say no."""
        return ""

    def recall(self) -> None:
        """Do nothing: a folder has no way to say so."""

    def state(self, site: str, index: int) -> str:
        """Say what the site's folder shows."""
        folder = self._inbox(site, index)
        if has_arrived(folder):
            return "has answered"
        if (folder / UPDATE_FACTS).exists():
            return f"has answered, but {UPDATE} is not the file that {UPDATE_FACTS} names"
        return "has not answered" if (folder / GLOBAL_FACTS).is_file() else "is not handed out"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
