"""The command works next to a user's packages with the names of recpress's packages.

``write_field_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from drafts import environment
from error_codes import raises_code
from field_draft import write_field_draft

import recpress
from infra.bundle.architecture import OWN_PACKAGES, network_class
from infra.errors import BundleRefused

NETWORK_FILE = Path(__file__).parents[1] / "field_network.py"


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with packages that must not be imported, and with the module of a network."""
    folder = tmp_path / "shop"
    for name in OWN_PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "shop_network.py").write_text(NETWORK_FILE.read_text())
    return folder


def test_bundle_is_packed_although_pythonpath_has_packages_of_the_same_names(
    user_folder: Path, tmp_path: Path
) -> None:
    draft = write_field_draft(tmp_path / "draft")
    manifest = draft / "model.json"
    manifest.write_text(manifest.read_text().replace("field_network:", "shop_network:"))
    process = subprocess.run(
        [str(Path(sys.executable).with_name("recpress")), "bundle", "pack", str(draft)],
        cwd=user_folder,
        env=environment(tmp_path)
        | {"PYTHONPATH": str(user_folder), "RECPRESS_ALLOWED_MODULES": "shop_network"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("fields@1 ")


def test_command_and_check_of_models_have_the_same_packages() -> None:
    assert recpress.PACKAGES == OWN_PACKAGES


@pytest.mark.parametrize("package", OWN_PACKAGES)
def test_network_in_a_package_with_the_name_of_one_of_recpress_is_refused(package: str) -> None:
    with raises_code(BundleRefused, "architecture_name_taken", package=package):
        network_class(f"{package}.models:Net", allowed=(package,))
