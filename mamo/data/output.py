"""Output of a command: complete or not at all, inside its folder, and over nothing of the user's."""

import filecmp
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType


class OutputFolder:
    """Context manager of the files that a command writes into a folder.

    Files are written into a hidden folder inside, and are moved to their places at the end, or removed after an error.
    A file that exists with other content is an error, unless `overwrite` is True.

    >>> with OutputFolder(Path("data/coco")) as output:
    ...     output.path("val.jsonl").write_text("...")
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        """Store the arguments.

        Args:
            folder: created if it is missing.
            overwrite: whether existing files may be replaced.
        """
        self.folder, self.overwrite = folder, overwrite

    def __enter__(self) -> "OutputFolder":
        """Create the folder. Raises ValueError if it is no folder."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: not a folder; name a folder to write")
        self.is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        return self

    def path(self, name: str) -> Path:
        """Return where to write the file that gets this name, a relative path. Creates its folder.

        Raises:
            ValueError: the name is outside of the folder.
        """
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"{name!r}: not a name inside of {self.folder}")
        file = self.temporary / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Move the files to their places, or remove them after an error; an OSError without a path gets the folder.

        Raises:
            ValueError: a file with other content exists, and `overwrite` is False. Nothing is moved.
        """
        try:
            if error is None:
                self._move()
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if error is not None and self.is_new and not any(self.folder.iterdir()):
                self.folder.rmdir()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # such as of a full disk
            raise OSError(error.errno, error.strerror, str(self.folder)) from error

    def _move(self) -> None:
        files = [file for file in self.temporary.rglob("*") if not file.is_dir()]
        names = [str(file.relative_to(self.temporary)) for file in files]
        for file, name in zip(files, names):
            target = self.folder / name
            is_free = not os.path.lexists(target) or (self.overwrite and not target.is_dir())
            if not is_free and not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
                raise ValueError(f"{target}: exists; choose another folder, or replace it with --overwrite")
        for file, name in zip(files, names):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
