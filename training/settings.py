"""One strict reader for the YAML of a training stage, given as a file on its command line.

Values only: it refuses unknown keys and knows no defaults; those stand beside the code that uses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tutelage.errors import ConfigInvalid

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def read(kind: type[SettingsT], file: Path | None) -> SettingsT:
    """The settings in `file`; defaults when no file is given.

    Raises:
        ConfigInvalid: the file is missing, is not YAML, or a key is unknown or has a wrong value; all faults are listed.
    """
    if file is None:
        return kind()
    try:
        return kind.model_validate(yaml.safe_load(file.read_text()) or {})
    except OSError as missing:
        raise ConfigInvalid(f"cannot read {file}: {missing.strerror}; pass an existing file to --config") from missing
    except yaml.YAMLError as broken:
        raise ConfigInvalid(f"{file} is not valid YAML: {broken}") from broken
    except ValidationError as broken:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {e['input']!r:.80})" for e in broken.errors())
        raise ConfigInvalid(f"{file}: {faults}") from broken


def without_bars() -> None:
    """Bars that redraw a line are noise in the logs of DVC and Prefect, which show the stages' own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
