"""The examples of docs/new-model.md, run as a user runs them.

``recpress new`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click_data import ITEMS, USERS, write_clicks
from page_examples import code_blocks, run_commands
from safetensors.torch import save_file

PAGE = Path(__file__).parents[1] / "docs" / "new-model.md"
# The folder into which ``make .venv`` installs the libraries of the page's models.
LIBRARIES = Path(sys.prefix) / "libraries"
BRANDS = 20


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    return code_blocks(PAGE, language)


def write_recbole_file(folder: Path) -> None:
    """Write the clicks of ``write_clicks`` in RecBole's format."""
    (folder / "shop").mkdir()
    splits = [pd.read_parquet(folder / "data" / f"{name}.parquet") for name in ("train", "test")]
    names = {"user": "user_id:token", "item": "item_id:token", "click": "label:float"}
    clicks = pd.concat(splits)[list(names)].rename(columns=names)
    clicks.to_csv(folder / "shop" / "shop.inter", sep="\t", index=False)


def write_purchases(folder: Path) -> None:
    """Write random weights of two towers, and each user's purchases of its best items."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.matching import DSSM

    rng = np.random.default_rng(0)
    query = [SparseFeature("user", USERS, 8)]
    item = [SparseFeature("item", ITEMS, 8), SparseFeature("brand", BRANDS, 8)]
    torch.manual_seed(0)
    model = DSSM(query, item, {"dims": [16, 8]}, {"dims": [16, 8]}).eval()
    for table in model.embedding.embed_dict.values():  # the library draws them with std 0.0001
        torch.nn.init.normal_(table.weight)
    save_file(model.state_dict(), folder / "towers.safetensors")
    items = {
        "item": torch.arange(ITEMS),
        "brand": torch.from_numpy(rng.integers(0, BRANDS, ITEMS)),
    }
    with torch.no_grad():
        scores = model.user_tower({"user": torch.arange(USERS)}) @ model.item_tower(items).T
    bought = scores.topk(32).indices.numpy()
    bought = rng.permuted(bought, axis=1)
    (folder / "purchases").mkdir()
    # The columns of ``bought`` are divided among the splits.
    for split, columns in {"train": (0, 10), "validation": (10, 12), "test": (12, 16)}.items():
        of_split = bought[:, slice(*columns)]
        user = np.repeat(np.arange(USERS), of_split.shape[1])
        purchases = pd.DataFrame({"user": user, "item": of_split.reshape(-1)})
        purchases.to_parquet(folder / "purchases" / f"{split}.parquet")
    catalogue = pd.DataFrame({name: values.numpy() for name, values in items.items()})
    catalogue.to_parquet(folder / "purchases" / "items.parquet")


def run(folder: Path, commands: str) -> str:
    """Run shell commands of the page in a folder, with the libraries; return their output."""
    return run_commands(folder, commands.replace("PYTHONPATH=.", f"PYTHONPATH=.:{LIBRARIES}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with the data and modules of the page."""
    write_clicks(tmp_path / "data")
    shop, towers, rechub, deepctr, recbole = blocks("python")
    (tmp_path / "shop_models.py").write_text(shop)
    (tmp_path / "rechub_click.py").write_text(rechub)
    (tmp_path / "deepctr_click.py").write_text(deepctr)
    (tmp_path / "rechub_towers.py").write_text(towers)
    (tmp_path / "recbole_click.py").write_text(recbole)
    names: dict[str, type] = {}
    exec(shop, names)  # noqa: S102 - the code of the page
    torch.manual_seed(0)
    save_file(
        names["ShopNet"](users=USERS, items=ITEMS, dim=8).state_dict(),
        tmp_path / "weights.safetensors",
    )
    return tmp_path


def test_first_example_prints_what_the_page_shows(folder: Path) -> None:
    export, new, pack, *_ = blocks("sh")[0].splitlines()
    output = run(folder, f"{export}\n{new}\n{pack}\n")
    # The page shows the table of inputs, which has the column "reason".
    (shown,) = (block for block in blocks("") if "reason" in block)
    assert output.startswith(shown)


@pytest.mark.slow
def test_second_example_writes_the_same_draft_as_the_first(folder: Path) -> None:
    export, new, *_ = blocks("sh")[0].splitlines()
    run(folder, f"{export}\n{new}\nmv draft first\n{blocks('sh')[1]}")
    for name in ("model.json", "model.safetensors"):
        assert (folder / "draft" / name).read_bytes() == (folder / "first" / name).read_bytes()


# ``index`` is that of the page's block of commands.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "module"),
    [(2, "rechub_towers"), (4, "rechub_click"), (5, "deepctr_click"), (6, "recbole_click")],
)
def test_model_of_a_library_is_trained_packed_and_compressed(
    folder: Path, index: int, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = blocks("sh")[index]
    assert module in commands
    if module == "recbole_click":
        write_recbole_file(folder)
    if module == "rechub_towers":
        monkeypatch.syspath_prepend(str(LIBRARIES))
        write_purchases(folder)
    output = run(folder, commands)
    assert "onnxruntime: accepted" in output
