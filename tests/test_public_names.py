"""Public names of the packages, imported in a fresh interpreter."""

import subprocess
import sys

import pytest

PACKAGES = ("infexport", "infexport.bundle", "infexport.inference", "infexport.inference.runners")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_can_be_imported(package):
    code = f"import {package} as package; print(*package.__all__)"
    names = run(code).split()
    assert names
    for name in names:
        run(f"from {package} import {name}")


def test_the_names_that_python_users_need():
    import infexport

    expected = {"Predictor", "export", "convert", "open_bundle", "InfexportError"}
    assert expected <= {*infexport.__all__}
    assert expected <= {*dir(infexport)}
    assert all(callable(getattr(infexport, name)) for name in expected)


def test_a_function_is_not_hidden_by_a_module():
    code = """
import infexport.conversion.convert, infexport.conversion.onnx_export, infexport.bundle.bundle
print(*(type(getattr(infexport, name)).__name__ for name in ("convert", "export", "open_bundle")))
"""
    assert run(code).split() == ["function"] * 3


@pytest.mark.parametrize("module", ["infexport", "infexport.inference", "infexport.__main__"])
def test_an_import_loads_neither_numpy_nor_torch(module):
    code = f"import sys, {module}; print(*({{'numpy', 'torch', 'onnxruntime'}} & {{*sys.modules}}))"
    assert run(code).split() == []


def test_onnx_runtime_is_kept_from_reporting_usage():
    assert (
        run(
            "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', 0); import infexport; "
            "print(os.environ['ORT_DISABLE_TELEMETRY'])"
        ).strip()
        == "1"
    )


def test_an_unknown_name_is_an_attribute_error():
    import infexport.inference

    for package in (infexport, infexport.inference):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018
