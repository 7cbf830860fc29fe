"""The command line: the whole path on small pictures, exit codes, and errors of one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")
from training_cases import (
    CLASSES,
    ROOT,
    SIZE,
    WIDTH,
    error_line,
    make_pictures,
    one_thread,  # noqa: F401
    program_environment,
    run_program,
    save_small,
)

from mobilesteelnet.__main__ import main
from mobilesteelnet.checkpoint import load_checkpoint
from mobilesteelnet.cli import EXIT_CODES
from mobilesteelnet.data import scan
from mobilesteelnet.predict import predict

COMMANDS = (
    *("train", "eval", "predict", "info", "export", "demo"),
    *("data check", "data synthetic"),
    *("crossval", "reproduce", "robustness", "package-weights"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("set") / "pictures", per_class=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_small(path)
    return path


def train_arguments(pictures: Path, out: Path) -> list[str]:
    options = ["--width", WIDTH, "--size", SIZE, "--epochs", 1, "--batch-size", 6]
    options += ["--fractions", "0.5,0.25,0.25", "--accelerator", "cpu", "--devices", 1]
    return [str(part) for part in ("train", "--data", pictures, "--out", out, *options)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: mobilesteelnet {command}" in " ".join(text.split())


def test_the_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(EXIT_CODES.split()) in text
    for code in (0, 1, 2, 3, 4, 5, 6, 70, 130):
        assert f"{code} " in EXIT_CODES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mobilesteelnet ")


@pytest.mark.parametrize("option", [[], ["--no-frozen"], ["--backend", "reference"]])
def test_frozen_by_default_with_the_same_answers(
    option: list[str],
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common, out = [*option, "--device", "cpu"], tmp_path / "out"
    assert main(["predict", str(checkpoint), str(pictures), "--json", "-", *common]) == 0
    got = json.loads(capsys.readouterr().out)["predictions"]
    data = scan(pictures, labelled=False)
    for item, want in zip(got, predict(load_checkpoint(checkpoint), data).items, strict=True):
        assert (item["name"], item["class"]) == (want.name, want.label)
        assert item["probability"] == pytest.approx(want.probability, rel=1e-5)
    arguments = ["eval", str(checkpoint), "--data", str(pictures), "--no-report", "--out", str(out)]
    assert main([*arguments, *common]) == 0
    about = json.loads((out / "evaluation.json").read_text())["about"]
    assert ("frozen" in about["backends"]) == (option != ["--no-frozen"])


def test_train_eval_predict(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(train_arguments(pictures, run)) == 0
    assert f"next: mobilesteelnet eval {run}" in capsys.readouterr().out
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    result = json.loads((run / "eval-test" / "evaluation.json").read_text())
    assert f"average accuracy {100 * result['average_accuracy']:.2f} %" in said
    assert len(result["predictions"]) == 3
    assert (run / "eval-test" / "report.html").stat().st_size > 10_000
    assert (
        main(["eval", str(run), "--split", "all", "--no-report", "--out", str(tmp_path / "e")]) == 0
    )
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["evaluation.json"]
    capsys.readouterr()
    assert main(["predict", str(run), str(pictures), "--json", "-", "--top-k", "2"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert len(predictions) == 12
    table = tmp_path / "result.csv"
    assert (
        main(["predict", str(run), str(pictures / "dark" / "dark_0.png"), "--csv", str(table)]) == 0
    )
    assert "dark_0.png" in capsys.readouterr().out
    with table.open() as handle:
        (row,) = csv.DictReader(handle)
    assert row["class"] == next(
        item["class"] for item in predictions if item["name"] == "dark/dark_0.png"
    )
    assert main(train_arguments(pictures, run)) == 2
    assert "--resume" in error_line(capsys)
    assert main(["train", "--resume", str(run), "--lr", "0.1", "--size", "9"]) == 2
    assert "leave out --learning-rate, --size" in error_line(capsys)


def test_several_paths_are_predicted_as_one_set(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(pictures, tmp_path / "set")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "set", "dark")
    (tmp_path / "set" / "dark" / "broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    alone = ["set/lines/lines_1.png", str(tmp_path / "set" / "lines" / "lines_0.png")]
    given = ["set/dark", "packed.zip", *alone, "set/dark/dark_0.png"]
    assert main(["predict", str(checkpoint), *given, "--json", "-"]) == 1
    told = json.loads(capsys.readouterr().out)
    found = {item["name"]: item["probability"] for item in told["predictions"]}
    dark = [f"dark/dark_{i}.png" for i in range(4)]
    names = {*(f"set/{name}" for name in dark), *(f"packed.zip/{name}" for name in dark), *alone}
    assert set(found) == names
    assert len(told["predictions"]) == len(names)
    assert [file["name"] for file in told["bad_files"]] == ["set/dark/broken.png"]
    for name in dark:
        assert found[f"set/{name}"] == pytest.approx(found[f"packed.zip/{name}"], rel=1e-5)
    assert main(["predict", str(checkpoint), "set/lines/lines_1.png", "--json", "-"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["predictions"]
    assert item["name"] == "lines_1.png"
    assert item["probability"] == pytest.approx(found[alone[0]], rel=1e-5)


def test_bad_files_give_code_1_and_their_names(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "set", per_class=1)
    (folder / "dark" / "[bold]broken.png").write_bytes(b"no picture")
    for command in (["predict", str(checkpoint)], ["data", "check"]):
        assert main([*command, str(folder)]) == 1
        captured = capsys.readouterr()
        assert "[bold]broken.png" in captured.err + captured.out
    out = str(tmp_path / "out")
    assert main(["eval", str(checkpoint), "--data", str(folder), "--out", out, "--no-report"]) == 1
    options = ["--data", str(folder), "--on-bad-file", "fatal"]
    assert main(["eval", str(checkpoint), *options]) == 3
    only = tmp_path / "only.png"
    only.write_bytes(b"no picture")
    assert main(["predict", str(checkpoint), str(only)]) == 3


def test_huge_pictures_are_refused_without_a_warning(
    checkpoint: Path,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    from PIL import Image

    picture = pictures / "dark" / "dark_0.png"
    with Image.open(picture) as image:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height - 1)
    assert main(["predict", str(checkpoint), str(picture)]) == 3
    assert "are not read" in capsys.readouterr().err
    assert not [str(item.message) for item in recwarn if "exceeds limit" in str(item.message)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "--data or --resume"),
        (["train", "--nonsense"], 2, "--nonsense"),
        (["train", "--data", "{set}", "--epochs", "x"], 2, "--epochs"),
        (["train", "--data", "{set}", "--epochs", "0"], 2, "epochs=0"),
        (["train", "--data", "{set}", "--fractions", "half"], 2, "--fractions 'half'"),
        (["train", "--data", "{set}", "--optimizer", "lion"], 2, "optimizer='lion'"),
        (["train", "--data", "{tmp}/none", "--out", "{tmp}/r"], 3, "none"),
        (["train", "--resume", "{tmp}"], 2, "holds no run"),
        (["eval", "{checkpoint}"], 2, "--data is needed"),
        (["eval", "{checkpoint}", "--data", "{set}", "--split", "test"], 2, "only a run folder"),
        (["eval", "{tmp}/none", "--data", "{set}"], 4, "does not exist"),
        (["predict", "{checkpoint}", "{tmp}/none.png"], 3, "none.png"),
        (["predict", "{tmp}/none.png", "{set}"], 3, "none.png' does not exist"),
        (["predict", "{checkpoint}", "{set}", "{checkpoint}"], 2, "before the pictures"),
        (["predict", "{checkpoint}", "{set}", "--device", "toaster"], 2, "device='toaster'"),
        (["predict", "{checkpoint}", "{set}", "--top-k", "0"], 2, "top_k=0"),
        (["predict", "{checkpoint}", "{set}", "--backend", "magic"], 2, "magic"),
        (["predict", "{checkpoint}", "{set}", "--classes", "a,b"], 4, "classes="),
        (["predict", "{checkpoint}", "{set}", "--classes", "a,,c"], 4, "different names"),
        (["predict", "{checkpoint}", "{set}", "--json", "-", "--csv", "-"], 2, "both"),
        (["predict", "{checkpoint}", "{set}", "--csv", "{tmp}/no/where.csv"], 6, "where.csv"),
        (["info", "--size", "0"], 2, "--size 0"),
        (["info", "{checkpoint}", "--size", "0"], 2, "--size 0"),
        (["demo", "--budget", "huge"], 2, "budget='huge'"),
        (["demo", "--data", "{tmp}/none", "--out", "{tmp}/d"], 3, "does not exist"),
        (["nonsense"], 2, "nonsense"),
        (["data", "check", "{tmp}"], 3, "no classes found"),
    ],
)
def test_errors_are_one_line_with_a_code(
    arguments: list[str],
    code: int,
    words: str,
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"set": pictures, "checkpoint": checkpoint, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == code
    assert words in error_line(capsys)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "train"]) == main(["train"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("Traceback") == 1
    assert errors.count("error: --data or --resume is needed") == 2


@pytest.mark.parametrize("options", ["info", "info --json -", "--help"])
def test_a_reader_that_has_gone_is_no_bad_picture(options: str) -> None:
    command = f"{sys.executable} -m mobilesteelnet {options}"
    told = subprocess.run(
        ["bash", "-c", f"{command} 2>/dev/null | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert told.stdout.strip() == "6"


def test_a_fault_of_the_program_has_its_own_code(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mobilesteelnet.networks

    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(mobilesteelnet.networks, "describe_network", broken)
    assert main(["info"]) == 70
    assert "ZeroDivisionError: oh (--debug shows where)" in error_line(capsys)


def test_info(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "8,438,535 parameters" in capsys.readouterr().out
    assert main(["info", str(checkpoint), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["input_size"], facts["classes"]) == (SIZE, CLASSES)


def test_data_check(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "contrast.png"
    assert main(["data", "check", str(pictures), "--plot", str(plot), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pictures"] == 12
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_export(checkpoint: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = tmp_path / "small.onnx"
    assert main(["export", str(checkpoint), str(out)]) == 0
    model = onnx.load(out)
    onnx.checker.check_model(model)
    about = {item.key: item.value for item in model.metadata_props}
    assert json.loads(about["classes"]) == CLASSES


def test_the_program_in_its_own_process(checkpoint: Path, pictures: Path) -> None:
    done = run_program("predict", checkpoint, pictures, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 12
    failed = run_program("info", pictures / "dark" / "dark_0.png")
    assert failed.returncode == 4
    assert failed.stderr.count("\n") == 1


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['typer'] = None\n"
        "from mobilesteelnet.__main__ import main\n"
        "sys.exit(main(['train']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=program_environment(),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == 'error: typer is missing: pip install "mobilesteelnet[cli]"\n'


# ------------------------------------------------------------------------------------------ demo


# ------------------------------------------------------------------------------------------ fuzz


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=300), as_checkpoint=st.booleans())
def test_random_files_give_typed_errors(
    content: bytes,
    as_checkpoint: bool,
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fuzz = tmp_path / ("fuzz.pth" if as_checkpoint else "fuzz.png")
    fuzz.write_bytes(content)
    if as_checkpoint:
        assert main(["predict", str(fuzz), str(pictures)]) == 4
    else:
        assert main(["predict", str(checkpoint), str(fuzz)]) == 3
    assert error_line(capsys)


WORDS = st.one_of(
    st.sampled_from(
        [
            *("train", "eval", "predict", "info", "data", "check", "demo", "--data", "--json", "-"),
            *("--epochs", "--size", "--top-k", "--out", "--resume", "--split", "--device", "-1"),
        ]
    ),
    st.text(max_size=8).filter(lambda text: "\x00" not in text and "/" not in text),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, max_size=5))
def test_random_words_never_crash(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # The demo would really run; its own arguments are tested above.
    code = main(["predict" if word == "demo" else word for word in words])
    assert code in {0, 1, 2, 3, 4, 5, 6}, code
    told = capsys.readouterr()
    if code >= 2:  # where a command is missing, the help is all there is to say
        assert "error: " in told.err or "Usage: " in told.out + told.err
