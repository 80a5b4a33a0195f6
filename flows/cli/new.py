"""The command ``recpress new``: write a draft from a trained network and its data.

A draft is the folder that becomes a bundle when it is packed.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.console import write, write_line, write_table
from flows.cli.options import Json

if TYPE_CHECKING:
    from tasks.bundles.draft_request import Library
    from tasks.bundles.new_draft import NewDraft

MAX_LISTED_COLUMNS = 10
"""Most columns that the command lists when it prompts for the label's column."""


def new(
    folder: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    data: Annotated[
        Path,
        typer.Option(help="Folder with train.parquet and test.parquet, or folders of these names."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The trained network as MODULE:NAME: a variable, or a function that returns it; "
            "with --weights its class.",
            metavar="MODULE:NAME",
        ),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="The trained network as an ONNX file, without --model.")
    ] = None,
    sentence_transformer: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a trained model of sentence-transformers, without --model."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with the labels; for several outputs one --label for each, in their "
            "order, or OUTPUT=COLUMN.",
            metavar="COLUMN",
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column that groups rows, such as by user or query.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Column with the time of a row.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric that decides quality (default: auc, or ndcg@10 for grades)."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Columns that fill an argument of another name: ids=user,item or dense=d*.",
            metavar="ARGUMENT=COLUMNS",
        ),
    ] = None,
    source: Annotated[
        Literal["torch-rechub", "deepctr-torch", "recbole", "sentence-transformers"] | None,
        typer.Option(
            "--from",
            help="Library of the network; a network of another class is refused. recbole: scores "
            "are those of predict. sentence-transformers: --model is the folder of the model.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of the network that returns the scores of rows (default: forward; with "
            "--from recbole predict)."
        ),
    ] = None,
    query_tower: Annotated[
        str | None,
        typer.Option(
            help="Submodule or method that returns the vectors of queries (two-tower models).",
            metavar="PATH",
        ),
    ] = None,
    item_tower: Annotated[
        str | None,
        typer.Option(help="Submodule or method that returns the items' vectors.", metavar="PATH"),
    ] = None,
    item: Annotated[
        str | None,
        typer.Option(
            help="Column with the item's id, in a retrieval model (default: the only column of "
            "integers that the rows and the catalogue have).",
            metavar="COLUMN",
        ),
    ] = None,
    query_text: Annotated[
        str | None,
        typer.Option(
            help="Column with the texts of queries, with --sentence-transformer (default: the "
            "only one that the catalogue lacks).",
            metavar="COLUMN",
        ),
    ] = None,
    item_text: Annotated[
        str | None,
        typer.Option(
            help="Column of the catalogue with the texts of items (default: the only one).",
            metavar="COLUMN",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model (default: that of its class, file or folder)."),
    ] = None,
    version: Annotated[str, typer.Option(help="Version of the model.")] = "1",
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the class, a .safetensors file.")
    ] = None,
    config: Annotated[str, typer.Option(help="Keyword arguments of the class, as JSON.")] = "{}",
    as_json: Json = False,
) -> None:
    """Write the draft of a bundle from a trained network and its data."""
    from compressors.contracts import FORWARD
    from infra.errors import CommandRefused
    from tasks.bundles.draft_request import DraftRequest, label_candidates, read_rows
    from tasks.bundles.new_draft import new_draft

    library: Library | None = None
    if source == "sentence-transformers":
        if model is None or sentence_transformer is not None:
            raise CommandRefused("from_needs_model", source=source)
        sentence_transformer, model = Path(model), None
    else:
        library = source
    rows = None
    labels = _parse_pairs("--label", label or [], key_is_optional=True)
    is_retrieval = query_tower is not None or sentence_transformer is not None
    if not labels and not is_retrieval and sys.stdin.isatty():
        rows = read_rows(data)
        candidates = label_candidates(rows)
        write_line(f"Columns of numbers: {', '.join(candidates[:MAX_LISTED_COLUMNS])}")
        answer = typer.prompt("Column with the labels", default=(candidates or ("",))[0])
        labels = {answer: answer}
    request = DraftRequest(
        folder=folder,
        model=model,
        data=data,
        labels=labels,
        metric=metric,
        group=group,
        time=time,
        inputs={
            argument: tuple(names.split(","))
            for argument, names in _parse_pairs("--input", columns or []).items()
        },
        library=library,
        method=method or ("predict" if library == "recbole" else FORWARD),
        query_tower=query_tower,
        item_tower=item_tower,
        item=item,
        name=name,
        version=version,
        weights=weights,
        config=config,
        onnx=onnx,
        sentence_transformer=sentence_transformer,
        query_text=query_text,
        item_text=item_text,
    )
    written = new_draft(request, rows)
    if as_json:
        write(written.draft.model_dump_json(indent=1))
    else:
        _show(written)


def _parse_pairs(
    option: str, values: list[str], *, key_is_optional: bool = False
) -> dict[str, str]:
    """Parse the values ``KEY=VALUE`` of an option; a value without key is its key too.

    Raises:
        CommandRefused: a value has another form, or a key occurs twice.
    """
    from infra.errors import CommandRefused

    pairs: dict[str, str] = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator and key_is_optional:
            value = key
        if not key or not value:
            raise CommandRefused("pair_form", option=option, got=text)
        if key in pairs:
            raise CommandRefused("pair_repeated", option=option, key=key)
        pairs[key] = value
    return pairs


def _show(written: "NewDraft") -> None:
    """Print the signature of a draft, and the next commands."""
    draft = written.draft
    input_rows = [
        [
            item.name,
            # A matrix is one tensor whose columns hold several inputs, its fields.
            f"{item.kind} of {len(item.fields)} parts" if item.kind == "matrix" else item.kind,
            ", ".join(item.columns[:4]) + (", ..." if len(item.columns) > 4 else ""),
            # An input has no reason only if it is an item's id that no tower reads.
            written.reasons.get(item.name, "identifies the item"),
        ]
        for item in draft.signature.inputs
    ]
    write_table(["input", "kind", "columns", "reason"], input_rows)
    write_table(
        ["output", "kind", "form", "label", "metric"],
        [
            [item.name, item.kind, item.form, item.label or "", item.metric]
            for item in draft.signature.outputs
        ],
    )
    tables = ", ".join(f"{name} ({rows:,})" for name, rows in sorted(written.rows_of_table.items()))
    write_line(f"Tables (rows): {tables or 'none'}")
    if written.unused:
        write_line(f"No effect on the output: {', '.join(written.unused)}")
    for remark in written.remarks:
        write_line(remark)
    write_line(
        f"Wrote {written.folder}/model.json and {written.weight_bytes:,} bytes of weights. A "
        "network built from them has the same scores."
    )
    write_line("Next:")
    write_line(f"  recpress bundle pack {written.folder}")
    output = draft.signature.outputs[0]
    # The limit is only an example; it is looser for the metrics of retrieval.
    min_change = "-0.02" if output.kind == "retrieval" else "-0.002"
    write_line(
        f"  recpress compress {draft.name} --preset fast --target onnxruntime "
        f'--limit "{output.metric} vs baseline >= {min_change}"'
    )
