"""`python -m bentos.tier.package`: pack a promoted student and its base into a Bento that serves on its own.

Knows BentoML's stores. It refuses to know promotion: it packs what it is given, once the digest has been verified. Needs
no network. Afterwards `bentoml serve NAME:VERSION` gives the same answers as the tier that was evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bentos.tier.contents import DIGEST, NAME, ROLE
from inference import adapters, base
from tutelage.errors import InvalidRequest, TutelageError

ROOT = Path(__file__).resolve().parents[2]
BENTOFILE = ROOT / "bentos" / "tier" / "bentofile.yaml"
BASE_FILES = ("*.safetensors", "*.json", "chat_template.jinja")
ADAPTER_FILES = (adapters.WEIGHTS, adapters.CONFIG, adapters.MANIFEST)
TAG_LENGTH = 63  # BentoML's limit for a name
SHORT = 16  # digits of a digest that make a version


def pack(student_name: str, adapter_dir: Path, *, digest: str, base_dir: Path, labels: Mapping[str, str] | None = None) -> dict[str, str]:
    """Import base and adapter into the model store, once each, and build a Bento of them.

    Returns the tags {"tag", "base_model", "adapter_model"}. Raises AdapterRejected when the adapter is not what the digest
    says or belongs to another base.
    """
    fingerprint = base.fingerprint(base_dir)
    adapters.verify(adapter_dir, digest=digest, base_fingerprint=fingerprint)
    slug = _slug(student_name)
    base_model = _store(f"tutelage-base:{fingerprint[:SHORT]}", base_dir, BASE_FILES, {ROLE: "base", NAME: "base", DIGEST: fingerprint})
    adapter_model = _store(
        f"{slug}-adapter:{digest[:SHORT]}",
        adapter_dir,
        ADAPTER_FILES,
        {ROLE: "adapter", NAME: student_name, DIGEST: digest},
    )
    described = {"student": student_name, "adapter_digest": digest, "base_fingerprint": fingerprint, **(labels or {})}
    bento = _build(slug, [base_model, adapter_model], described)
    return {"tag": str(bento.tag), "base_model": base_model, "adapter_model": adapter_model}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tags as one line of JSON; on refusal print why and return 2."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    asked = _parser().parse_args(argv)
    try:
        tags = pack(asked.student_name, asked.adapter, digest=asked.digest, base_dir=asked.base, labels=_labels(asked.label))
    except TutelageError as error:
        print(f"not packaged: {error.message}", file=sys.stderr)
        return 2
    print(json.dumps(tags))
    return 0


def _build(name: str, models: Sequence[str], labels: dict[str, str]) -> Any:
    """Build as `bentoml build -f` does, from our bentofile with these models added."""
    import bentoml
    import yaml

    config = {**yaml.safe_load(BENTOFILE.read_text()), "models": list(models)}
    with tempfile.TemporaryDirectory() as folder:
        bentofile = Path(folder) / BENTOFILE.name
        bentofile.write_text(yaml.safe_dump(config))
        return bentoml.bentos.build_bentofile(str(bentofile), name=name, labels=labels, build_ctx=str(ROOT))


def _store(tag: str, folder: Path, patterns: Sequence[str], metadata: dict[str, str]) -> str:
    """Copy a folder's files into the model store under `tag`, unless the store has that tag."""
    import bentoml

    try:
        return str(bentoml.models.get(tag).tag)
    except bentoml.exceptions.NotFound:
        pass
    with bentoml.models.create(tag, metadata=dict(metadata), labels={"role": metadata[ROLE]}) as model:
        for pattern in patterns:
            for path in folder.glob(pattern):
                if not path.name.startswith("."):
                    shutil.copyfile(path, Path(model.path) / path.name)
    return str(model.tag)


def _slug(student_name: str) -> str:
    """A name BentoML accepts; the student's own name is kept in the stored model."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", student_name.lower()).strip("._-")
    slug = slug[: TAG_LENGTH - len("-adapter")].rstrip("._-")
    if not slug:
        raise InvalidRequest(f"student name {student_name!r} has no letter or digit; a Bento needs one in its name")
    return slug


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise InvalidRequest(f"--label {pair!r} is not key=value", param="label")
        labels[key] = value
    return labels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bentos.tier.package", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student-name", required=True, help="the name the adapter is served under")
    parser.add_argument("--adapter", required=True, type=Path, help="folder with the verified adapter")
    parser.add_argument("--digest", required=True, help="the adapter's digest, as evaluated")
    parser.add_argument("--base", required=True, type=Path, help="folder with the base it was trained on")
    parser.add_argument("--label", action="append", default=[], help="key=value, kept on the Bento; may be repeated")
    return parser


if __name__ == "__main__":
    sys.exit(main())
