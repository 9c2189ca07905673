"""`xray push`."""

from __future__ import annotations

from typing import Annotated

import typer

from xray.commands.common import guarded
from xray.commands.help import examples
from xray.words import count


@examples(
    (
        "xray push runs/small/clip hf://acme/photo-clip --license apache-2.0",
        "the artifact, for xray.load and all commands: xray eval hf://acme/photo-clip",
    ),
    (
        "xray push exports/timm hf://acme/photo-vit --private",
        'an export, for timm.create_model("hf-hub:acme/photo-vit", pretrained=True)',
    ),
)
@guarded
def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|EXPORT", help="An artifact, or a folder that xray export --to wrote"
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="hf://ORG/NAME[@BRANCH]", help="A model on the Hugging Face Hub; made if new"
        ),
    ],
    licence: Annotated[
        str,
        typer.Option(
            "--license", metavar="ID", help="SPDX identifier (default: license= of the run)"
        ),
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new one private")] = False,
) -> None:
    """Publish ARTIFACT or an export with its model card; only what differs there is sent.

    The token is that of `hf auth login`, or HF_TOKEN in the environment. It needs write access.
    """
    from xray.exports.push import push as send

    done = send(source, target, licence, private)
    if done.sent or done.removed:
        removed = f", {len(done.removed)} removed" if done.removed else ""
        print(f"pushed: {count(len(done.sent), 'file')}, {done.unchanged} unchanged{removed}")
    else:
        print(f"nothing to push: all {count(done.unchanged, 'file')} are there")
    print(f"   {done.page}")
    if done.base:
        print(f"   it needs its base LLM, which is not among the files: text.llm={done.base}")
