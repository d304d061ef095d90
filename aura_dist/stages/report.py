"""report: run directories → one page and its pictures. Never imports torch."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from aura_dist.config.verbs import ReportConfig
from aura_dist.errors import ConfigError, StoreError
from aura_dist.files import write_whole
from aura_dist.report.page import Shown, check_extra, make_page
from aura_dist.report.rundir import INTERVENTIONS, JOBS, RunDirectory, named_apart, open_run
from aura_dist.report.scores import Bar

logger = logging.getLogger(__name__)


def run(config: ReportConfig) -> None:
    """Write the page, and its pictures into a folder of the page's name."""
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out: expected a file that ends in .html, got {config.out!r}")
    if out.is_dir():
        raise ConfigError(f"--out: expected a file, got the directory {config.out!r}")
    check_extra()
    runs: list[RunDirectory] = named_apart([open_run(path) for path in config.run_dirs])
    _check_place(out, runs)
    shown = Shown(Bar(config.expert_auroc, config.expert_q), config.num_neurons, config.num_prompts)
    page, pictures = make_page(runs, shown, datetime.now(UTC))
    folder = out.with_name(f"{out.stem}-pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        write_whole(out, page)
    except OSError as error:
        raise StoreError(f"--out {config.out!r} cannot be written: {error}") from error
    logger.info("wrote %s: %.1f MB; %d pictures in %s/", out, len(page.encode()) / 1e6, len(pictures), folder)


def _check_place(out: Path, runs: Sequence[RunDirectory]) -> None:
    """ConfigError if the page would replace another file, or be within a part of a run."""
    if out.is_file() and out.stat().st_size and not _is_page(out):
        raise ConfigError(f"--out: expected a new file, or a page to replace, got another file: {str(out)!r}")
    parts = [run.path / name for run in runs for name in (INTERVENTIONS, JOBS)]
    parts += [Path(store) for run in runs for store in run.stores]
    for part in parts:
        if out.resolve().is_relative_to(part.resolve()):
            raise ConfigError(f"--out: expected a file beside the parts of the run, got one within {str(part)!r}")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html"))
