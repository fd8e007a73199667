"""Regenerate the committed golden files: `python -m tests.golden`."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden.make import FILES, files_of, make


def main() -> None:
    with TemporaryDirectory() as name:
        make(Path(name))
        files = files_of(Path(name))
    shutil.rmtree(FILES, ignore_errors=True)
    for path, data in files.items():
        (FILES / path).parent.mkdir(parents=True, exist_ok=True)
        (FILES / path).write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes in {FILES}")


if __name__ == "__main__":
    main()
