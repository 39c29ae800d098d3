"""`distillkit schema`: the JSON schemas of both kinds of YAML files; and docs/settings.md, generated from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from distillkit.capture.settings import CaptureSettings
from distillkit.capture.settings_file import captures_schema
from distillkit.cli.common import Choice
from distillkit.configuration.describe import json_schema, section_tables
from distillkit.training.config.file import training_schema
from distillkit.training.config.schema import RunConfig

__all__ = ["schema", "settings_page"]

SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"train": training_schema, "capture": captures_schema}


@click.command(short_help="Print the JSON schema of a configuration file.")
@click.argument("kind", type=Choice(list(SCHEMAS)))
def schema(kind: str) -> None:
    """Print the JSON schema of a configuration file: that of `distillkit config.yaml` (train) or of `distillkit
    capture FILE.yaml` (capture).

    Editors use it to complete settings and mark mistakes. Save it, and begin the YAML file with this line:

    \b
      # yaml-language-server: $schema=train.schema.json
    """
    click.echo(json.dumps(SCHEMAS[kind](), indent=2, ensure_ascii=False))


_PAGE = """# Settings

Generated from the code by `make docs`; do not edit.

A YAML file has the settings of a training run (`distillkit config.yaml`) or of captures
(`distillkit capture captures.yaml`). All unknown settings and invalid values are reported at once,
before anything is loaded. *Published* means: of the original DistillKit ([glossary](glossary.md)).

Editors with the YAML language server complete settings, show their descriptions and mark mistakes.
Write the JSON schemas to files, and begin each YAML file with the line that names its schema:

```bash
distillkit schema train > train.schema.json
distillkit schema capture > capture.schema.json
```

## Training

```yaml
# yaml-language-server: $schema=train.schema.json
model: ./student
output_path: ./trained
sequence_length: 1024
dataset:
  train_dataset: {{disk_path: ./captured}}
teacher: {{kind: dataset}}
```

{training}

## Captures

Every setting except the three sections `hf`, `vllm` and `openai` is also an option of
`distillkit capture` (`--max-seq-len 2048`), as are the settings in these sections. All of them are
arguments of `distillkit.capture.capture`. In a file, engine settings go in the engine's section or
at the top level (`tensor_parallel_size: 4`). A file may list several captures under `captures`,
each with the settings in which it differs.

```yaml
# yaml-language-server: $schema=capture.schema.json
dataset: ./text.jsonl
engine: vllm
vllm: {{tensor_parallel_size: 4}}
captures:
- {{model: ./teacher-8b, output: ./captured-8b}}
- {{model: ./teacher-70b, output: ./captured-70b, max_seq_len: 2048}}
```

{capture}
"""


def settings_page() -> str:
    """Return the text of docs/settings.md: all settings of both kinds of files, in one table per section."""
    tables = {
        "training": section_tables(json_schema(RunConfig)),
        "capture": section_tables(json_schema(CaptureSettings)),
    }
    return _PAGE.format(**{name: "\n\n".join(parts) for name, parts in tables.items()})


if __name__ == "__main__":
    click.echo(settings_page(), nl=False)
