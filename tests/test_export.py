"""The exported graph, run by ONNX Runtime, against torch."""

import json
import sys

import onnx
import onnxruntime
import pytest
import torch

from kdkernels.asr import data, export, features, files, model


@pytest.fixture
def run(tmp_path):
    """A folder with a student of random weights."""
    torch.manual_seed(0)
    encoder = model.Encoder(16, 3, 6)
    path = tmp_path / "student_distilled.safetensors"
    facts = {"shape": encoder.shape, "alphabet": " abc\u00e9"}
    files.save_tensors(path, encoder.state_dict(), "key", **facts)
    return tmp_path, encoder.eval()


@pytest.mark.parametrize(("N", "frames"), [(1, 3), (1, 1000), (4, 47)])
def test_onnx_runtime_gives_torchs_logits(run, capsys, N, frames):
    folder, encoder = run
    assert export.main([str(folder), str(folder / "student.onnx")]) == 0
    assert "its logits are those of torch to " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    x = torch.randn(N, frames, features.MELS)
    lengths = torch.randint(3, frames + 1, (N,))
    logits, logit_lengths = session.run(None, {"features": x.numpy(), "lengths": lengths.numpy()})
    with torch.no_grad():
        expected, expected_lengths = encoder(x, lengths)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)
    assert logit_lengths.tolist() == expected_lengths.tolist()


def test_a_streaming_student(tmp_path):
    """Of the default depth: more than one layer of attention."""
    torch.manual_seed(0)
    encoder = model.Encoder(16, 6, 6, 8, 4)
    path = tmp_path / "student_streaming.safetensors"
    facts = {"shape": encoder.shape, "alphabet": " abc\u00e9"}
    files.save_tensors(path, encoder.state_dict(), "key", **facts)
    assert export.main([str(path), str(tmp_path / "student.onnx")]) == 0


def test_a_model_without_characters_is_refused(tmp_path, capsys):
    encoder = model.Encoder(16, 1, 512)
    path = tmp_path / "ssl.safetensors"
    files.save_tensors(path, encoder.state_dict(), "key", shape=encoder.shape, alphabet=" abc")
    assert export.main([str(path), str(tmp_path / "a.onnx")]) == 2
    assert "says no characters but 512 codes" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


def test_the_file_says_what_it_needs(run):
    folder, _ = run
    export.main([str(folder), str(folder / "student.onnx")])
    graph = onnx.load(folder / "student.onnx")
    (metadata,) = (p.value for p in graph.metadata_props if p.key == "kdkernels")
    facts = json.loads(metadata)
    assert facts["alphabet"] == " abc\u00e9"
    assert facts["mels"] == features.MELS
    assert len(data.Alphabet(facts["alphabet"])) == 6


def test_a_graph_that_disagrees_is_not_written(run, capsys, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    assert export.main([str(folder), str(folder / "student.onnx")]) == 2
    assert "differ from torch's by" in capsys.readouterr().err
    assert not (folder / "student.onnx").exists()


def test_no_model_no_package_no_folder(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    assert export.main([str(tmp_path / "none"), "a.onnx"]) == 2
    assert "there is no model" in capsys.readouterr().err
    assert export.main([str(folder), str(tmp_path / "no" / "folder" / "a.onnx")]) == 2
    assert f"there is no folder {tmp_path / 'no' / 'folder'}" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    assert export.main([str(folder), str(tmp_path / "file" / "a.onnx")]) == 2
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.main([str(folder), "a.onnx"]) == 2
    assert 'onnxruntime is missing: pip install "kdkernels[export]"' in capsys.readouterr().err
