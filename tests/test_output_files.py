"""What the commands write: never instead of an input, through links and pipes, checked at first."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")
from training_cases import error_line, make_pictures, save_small

from mobilesteelnet.__main__ import main
from mobilesteelnet.run_folder import write_text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("set") / "pictures", per_class=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_small(path)
    return path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full here")
def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_text("/dev/full", "all of it")


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, real = tmp_path / "link.csv", tmp_path / "elsewhere" / "real.csv"
    link.symlink_to(real)
    for text in ("first", "second"):  # a file that is not there yet, and one that is
        write_text(link, text)
        assert link.is_symlink()
        assert real.read_text() == text
        assert list(real.parent.iterdir()) == [real]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_to_and_stays(tmp_path: Path, linked: bool) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(link if linked else pipe, "all of it")
    reader.join(60)
    assert got == ["all of it"]
    assert pipe.is_fifo()
    assert link.is_symlink()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors have no names here")
def test_a_descriptor_is_written_to(tmp_path: Path) -> None:
    """As /dev/stdout is one: the file behind it stays open and is written on."""
    with (tmp_path / "out").open("w") as out:
        out.write("before ")
        out.flush()
        write_text(f"/proc/self/fd/{out.fileno()}", "text")
    assert (tmp_path / "out").read_text() == "before text"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["robustness", "{checkpoint}", "--data", "{set}", "--json", "{tmp}/no/r.json"],
            "r.json: No such file",
        ),
        (
            ["predict", "{checkpoint}", "{set}", "--csv", "{tmp}/no/r.csv"],
            ": No such file or directory: ",
        ),
        (["predict", "{checkpoint}", "{set}", "--json", "{tmp}"], "Is a directory"),
        (["data", "check", "{set}", "--json", "{tmp}/no/r.json"], ": No such file or directory: "),
        (["info", "--json", "{tmp}/no/r.json"], ": No such file or directory: "),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    arguments: list[str],
    words: str,
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it has begun")

    for name in ("cli.open_checkpoint", "cli_results.open_checkpoint", "cli.bar"):
        monkeypatch.setattr(f"mobilesteelnet.{name}", work)
    places = {"set": pictures, "checkpoint": checkpoint, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 6
    assert words in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{checkpoint}", "{set}", "--csv", "{input}.png"],
        ["predict", "{checkpoint}", "{set}", "--json", "{input}.safetensors"],
        ["export", "{checkpoint}", "{input}.safetensors"],
        ["export", "{checkpoint}", "-"],
        ["data", "check", "{set}", "--plot", "{input}.pdf"],
        ["calibrate", "{checkpoint}", "--data", "{set}", "--out", "{input}.png"],
    ],
)
def test_a_name_of_another_kind_is_refused(
    arguments: list[str],
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = [tmp_path / f"input{end}" for end in (".png", ".safetensors", ".pdf")]
    for one in inputs:
        one.write_text("precious")
    places = {"set": pictures, "checkpoint": checkpoint, "input": tmp_path / "input"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert "named like an input" in (line := error_line(capsys)) or "must end in" in line
    assert {one.read_text() for one in inputs} == {"precious"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "check", "{set}", "--plot", "{set}/dark/dark_0.png"], "lies in the pictures"),
        (["predict", "{checkpoint}", "{set}", "--json", "{tmp}/r", "--csv", "{tmp}/r"], "twice"),
    ],
)
def test_nothing_is_replaced_by_what_it_was_made_from(
    arguments: list[str],
    words: str,
    pictures: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (pictures / "dark" / "dark_0.png").read_bytes()
    places = {"set": pictures, "checkpoint": checkpoint, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert words in error_line(capsys)
    assert (pictures / "dark" / "dark_0.png").read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_answered(
    pictures: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mobilesteelnet.predict.predict", interrupt)
    assert main(["predict", str(checkpoint), str(pictures)]) == 130
    assert error_line(capsys) == "error: interrupted"
    monkeypatch.setattr("mobilesteelnet.predict.predict", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("mobilesteelnet.__main__._explain", interrupt)
    assert main(["predict", str(checkpoint), str(pictures)]) == 130
    assert error_line(capsys) == "error: interrupted"


def test_no_command_shows_the_help_and_no_empty_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    told = capsys.readouterr()
    assert "Usage: mobilesteelnet" in told.out + told.err
    assert "error:" not in told.err


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crossval", "--data", "none", "--set", "bogus=1"]) == 2
    assert "there is no option 'bogus'" in error_line(capsys)


@pytest.mark.parametrize("columns", ["40", "0"])  # 0: it has not been told its size
def test_a_narrow_terminal_shows_every_figure(
    checkpoint: Path,
    pictures: Path,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["predict", str(checkpoint), str(pictures), "--top-k", "9"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert len(re.findall(r"\d+\.\d │$", shown, re.MULTILINE)) == 18  # six pictures, three classes
