"""What is on disk: images, claims on them, and the part files of what is known of them."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import settings
from lesion.run.capture import in_store
from lesion.store import claims as claims_module
from lesion.store import scores as parts_module
from lesion.store.claims import Claims
from lesion.store.images import Damaged, Known, Picture, Store, atomically, digest_of
from lesion.store.scores import Scores
from lesion.study.grid import Cell, ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.prompts import Prompt, slug

MODEL = ModelIdentity("tiny", "f" * 32, "float32")
LAYERS = tuple(f"down_blocks.0.attentions.{i}" for i in range(4))
BLACK = np.zeros((8, 8, 3), np.uint8)


def a_cell(seed: int = 0, prompt: str = "a red circle") -> Cell:
    return Cell(MODEL, Prompt(prompt), seed, settings(), None)


def a_key(i: int) -> str:
    return f"{i * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `code`, with pipes to talk through."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- images


def test_few_images_of_other_studies_are_not_looked_for_among_all_keys(tmp_path, monkeypatch):
    prompts = tuple(Prompt(f"a {n}", id=str(n)) for n in range(4000))
    study = Study(MODEL, settings(), prompts, (0, 1), LAYERS, {"leave_one_out": {}}, (Replacement("zero"),))
    store, cells = Store(tmp_path), list(itertools.islice(study.in_plan_order(), 7000, 7001))
    asked = []
    lists = Known.lists
    monkeypatch.setattr(Known, "lists", lambda self, key: asked.append(key) or lists(self, key))
    for number, cell in enumerate([a_cell(), a_cell(1), *cells]):
        store.put(cell, BLACK)
        counts = in_store(study, store, None)
        assert (counts.unique, counts.stored) == (len(study), max(0, number - 1))
        assert len(asked) == (0 if number < 2 else 8000)  # the baselines, one of which is there
    store.path(a_cell().key).write_bytes(b"torn")  # it may be of this study: its name alone tells
    assert in_store(study, store, None).stored == 1 and len(asked) == 8000 + len(study)


def test_store_keeps_pixels_and_says_what_they_are(tmp_path):
    store, cell = Store(tmp_path), a_cell()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert not store.has(cell.key)
    picture = store.put(cell, pixels, "image is all black")
    assert store.has(cell.key)
    stored = store.get(cell.key)
    assert np.array_equal(stored.pixels, pixels)
    assert stored.reason == "image is all black"
    facts = store.path(cell.key).stat()
    assert stored.picture == picture
    assert picture == Picture(facts.st_size, facts.st_mtime_ns, digest_of(pixels), "image is all black")
    assert '"prompt": "a red circle"' in Image.open(store.path(cell.key)).text["lesion"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_a_digest_tells_pixels_and_shapes_apart():
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3)
    other = pixels.copy()
    other[7, 3, 2] ^= 1
    different = [pixels, other, pixels.reshape(4, 8, 3), pixels.transpose(1, 0, 2), pixels[::-1]]
    assert len({digest_of(array) for array in different}) == len(different)
    assert digest_of(np.asfortranarray(pixels)) == digest_of(pixels)  # however they lie in memory


@pytest.mark.parametrize(
    "prompt", ["<script>\n\"'\\ \x01", "x" * 10000, "\u202eعربي", "../../etc/passwd", "\\input{x}"]
)
def test_store_takes_any_prompt(tmp_path, prompt):
    store, cell = Store(tmp_path), a_cell(prompt=prompt)
    store.put(cell, BLACK)
    assert json.loads(Image.open(store.path(cell.key)).text["lesion"])["prompt"] == prompt
    assert "/" not in slug(prompt)
    assert len(slug(prompt)) < 50


def test_store_notices_damage(tmp_path):
    store, cell, other = Store(tmp_path), a_cell(), a_cell(1)
    store.put(cell, BLACK)
    store.path(other.key).parent.mkdir(exist_ok=True)
    os.link(store.path(cell.key), store.path(other.key))
    with pytest.raises(Damaged, match="another cell"):
        store.get(other.key)
    whole = store.path(cell.key).read_bytes()
    store.path(cell.key).write_bytes(whole[:-5])
    assert not store.has(cell.key)
    for broken in (
        whole[:40] + bytes(20) + whole[60:],
        b"",
        whole[: len(whole) // 2],
        bytes(len(whole)),
        b"GIF89a" + whole[6:],
    ):
        store.path(cell.key).write_bytes(broken)
        with pytest.raises(Damaged):
            store.get(cell.key)
    store.discard(cell.key)
    with pytest.raises(Damaged):
        store.get(cell.key)


def test_no_changed_byte_changes_pixels_unnoticed(tmp_path):
    store, cell = Store(tmp_path), a_cell()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    store.put(cell, pixels, "why")
    whole, noticed = store.path(cell.key).read_bytes(), 0
    for place in range(0, len(whole), 3):
        store.path(cell.key).write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            stored = store.get(cell.key)
            assert np.array_equal(stored.pixels, pixels) and stored.reason == "why"
        except Damaged:
            noticed += 1
    assert noticed > 0.3 * len(whole)


def test_a_changed_file_no_longer_matches_its_facts(tmp_path):
    store, cell = Store(tmp_path), a_cell()
    picture = store.put(cell, BLACK)
    assert store.matches(cell.key, picture)
    assert not store.matches(a_cell(1).key, picture)
    path = store.path(cell.key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes(5))  # torn, and its time put back
    os.utime(path, ns=(picture.modified, picture.modified))
    assert not store.matches(cell.key, picture)
    path.write_bytes(whole)
    os.utime(path, ns=(picture.modified + 1, picture.modified + 1))
    assert not store.matches(cell.key, picture)


def test_known_lists_whole_images_once(tmp_path, monkeypatch):
    store = Store(tmp_path)
    assert len(store.known()) == 0
    cells = [a_cell(seed) for seed in range(20)]
    for cell in cells[:10]:
        store.put(cell, BLACK)
    torn = store.path(cells[0].key)
    torn.write_bytes(torn.read_bytes()[:-1])
    (tmp_path / "cells" / "notes.txt").write_text("by hand")
    (torn.parent / "thumbs.png").write_bytes(b"")
    known = store.known()
    store.put(cells[10], BLACK)
    assert len(known) == 10
    assert [cell.key in known for cell in cells] == [False] + [True] * 9 + [False] * 10
    assert len(known) == 9
    assert "no key" not in known

    def refuse(*arguments, **options):
        raise AssertionError("a system call")

    monkeypatch.setattr(os, "open", refuse)
    assert [cell.key in known for cell in cells] == [False] + [True] * 9 + [False] * 10


def test_known_is_compact(tmp_path):
    """Names alone, without a file each: what a million images cost in memory."""
    import tracemalloc

    known, count = Store(tmp_path).known(), 20_000
    names = [f"{a_key(i)}.png" for i in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", lambda folder: iter(names))
        tracemalloc.start()
        known._list(tmp_path)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert len(known) == count
    assert used / count < 160


def test_listing_sweeps_up_what_killed_processes_left(tmp_path):
    store, cell = Store(tmp_path), a_cell()
    store.put(cell, BLACK)
    old, young = (store.path(cell.key).with_name(f".{name}.tmp") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    assert cell.key in store.known()
    assert young.exists() and not old.exists()


def test_many_threads_may_store_the_same_images(tmp_path):
    store, cells = Store(tmp_path), [a_cell(seed) for seed in range(6)]
    images = [np.full((16, 16, 3), shade, np.uint8) for shade in range(6)]
    for cell, image in zip(cells, images, strict=True):
        store.put(cell, image)
    done = threading.Event()

    def read():
        while not done.is_set():
            for cell, image in zip(cells, images, strict=True):
                assert store.has(cell.key)
                assert np.array_equal(store.get(cell.key).pixels, image)

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(store.put, *pair) for _ in range(20) for pair in zip(cells, images, strict=True)]
        pictures = [writer.result() for writer in writers]
        done.set()
        reader.result()
    assert {picture.digest for picture in pictures} == {digest_of(image) for image in images}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6


def test_atomic_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomically(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


# --- claims

KEYS = [a_key(i) for i in range(12)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def plant(folder: Path, key: str, **changes: object) -> Path:
    """A claim of a process on another machine."""
    path = folder / key[:2] / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "start": "", "token": f"t{key}", **changes}))
    return path


def test_a_claim_has_one_owner_until_it_is_given_back(tmp_path):
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take(KEYS[:4]) == set(KEYS[:4])
        assert ours.take(KEYS[:4]) == set(KEYS[:4])  # it is ours already
        assert theirs.take(KEYS[2:6]) == set(KEYS[4:6])
        assert theirs.held(KEYS) == set(KEYS[:4])
        assert ours.held(KEYS) == set(KEYS[4:6])
        theirs.release(KEYS)  # only their own
        assert theirs.held(KEYS) == set(KEYS[:4])
        ours.release(KEYS[:1])
        assert theirs.take(KEYS[:2]) == {KEYS[0]}
    assert files(tmp_path) == []
    with pytest.raises(ValueError, match="expires"):
        Claims(tmp_path, expires=0)


def test_claims_are_given_back_after_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), Claims(tmp_path) as ours:
        ours.take(KEYS)
        raise KeyboardInterrupt
    assert files(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "lesion-claims"]


def test_claims_that_cannot_be_written_raise(tmp_path):
    (tmp_path / "file").write_text("")
    with Claims(tmp_path / "file") as ours, pytest.raises(OSError, match="file"):
        ours.take(KEYS)


TAKER = """
import sys, time
from pathlib import Path
from lesion.store.claims import Claims
folder, *keys = sys.argv[1:]
sys.stdin.readline()
with Claims(Path(folder)) as claims:
    print(*claims.take(keys), flush=True)
    sys.stdin.readline()
"""


def test_a_killed_process_blocks_nobody(tmp_path):
    process = python(TAKER, tmp_path, *KEYS)
    print(file=process.stdin, flush=True)
    assert set(process.stdout.readline().split()) == set(KEYS)
    with Claims(tmp_path) as ours:
        assert ours.take(KEYS) == set()
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
        assert ours.held(KEYS) == set()
        assert ours.take(KEYS[:6]) == set(KEYS[:6])
        process.communicate()
        assert ours.take(KEYS) == set(KEYS)
    assert files(tmp_path) == []


def test_a_later_process_with_the_same_id_owns_nothing(tmp_path):
    if not claims_module._start_of(os.getpid()):
        pytest.skip("the system does not tell when a process started")
    path = plant(tmp_path, KEYS[0], machine=claims_module.machine(), pid=os.getpid(), start="1")
    with Claims(tmp_path) as ours:
        assert ours.take(KEYS[:1]) == {KEYS[0]}
        assert json.loads(path.read_text())["start"] == claims_module._start_of(os.getpid())


@pytest.mark.parametrize("content", [None, "", '{"machine": "else', "[3]"])
def test_claims_of_other_machines_expire_by_age(tmp_path, content):
    path = plant(tmp_path, KEYS[0])
    if content is not None:  # its process was killed while it wrote
        path.write_text(content)
    with Claims(tmp_path, expires=100) as ours:
        assert ours.held(KEYS) == {KEYS[0]}
        assert ours.take(KEYS[:1]) == set()
        age = 99 if content is None else 4
        os.utime(path, (time.time() - age,) * 2)
        assert ours.take(KEYS[:1]) == set()
        os.utime(path, (time.time() - age - 2,) * 2)
        assert ours.held(KEYS) == set()
        assert ours.take(KEYS[:1]) == {KEYS[0]}
    assert files(tmp_path) == []


def test_age_is_told_by_the_file_systems_clock(tmp_path, monkeypatch):
    plant(tmp_path, KEYS[0])
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is far ahead
    with Claims(tmp_path) as ours:
        assert ours.take(KEYS[:1]) == set()


def test_the_heartbeat_keeps_claims_and_notices_lost_ones(tmp_path, caplog):
    with Claims(tmp_path, expires=0.4) as ours, Claims(tmp_path, expires=0.4) as theirs:
        ours.take(KEYS[:2])
        time.sleep(1)
        assert theirs.take(KEYS[:2]) == set()
        plant(tmp_path, KEYS[0])  # as if we had stood still and it had been stolen
        time.sleep(0.3)
        assert KEYS[0] in caplog.text
        ours.release(KEYS[:2])
        assert theirs.held(KEYS) == {KEYS[0]}
        ours.take(KEYS[2:3])
        ours._stop.set()  # this process hangs: it lives, but its claims grow old
        time.sleep(0.7)
        assert theirs.take(KEYS[2:3]) == {KEYS[2]}


def test_claims_that_vanish_are_told_of_once(tmp_path, caplog):
    with Claims(tmp_path, expires=0.2) as ours:
        for _ in range(2):
            assert ours.take(KEYS[:3]) == set(KEYS[:3])
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            time.sleep(0.2)
    assert caplog.text.count("claims were lost") == 1 and "3, the first on" in caplog.text


def test_a_folder_that_vanishes_while_an_image_is_written_is_made_again(tmp_path, monkeypatch):
    store, cell = Store(tmp_path / "store"), a_cell()
    save = Image.Image.save

    def vanishing(*arguments, **given):
        monkeypatch.setattr(Image.Image, "save", save)
        shutil.rmtree(store.folder)
        save(*arguments, **given)

    monkeypatch.setattr(Image.Image, "save", vanishing)
    store.put(cell, BLACK)
    assert np.array_equal(store.get(cell.key).pixels, BLACK)


CONTENDER = """
import os, sys, time
from pathlib import Path
from lesion.store.claims import Claims
folder, seconds, *keys = sys.argv[1:]
taken = doubled = 0
sys.stdin.readline()
end = time.monotonic() + float(seconds)
while time.monotonic() < end:
    with Claims(Path(folder, "claims")) as claims:
        for key in (mine := claims.take(keys)):
            try:
                os.close(os.open(Path(folder, key), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                doubled += 1
        for key in mine:
            Path(folder, key).unlink(missing_ok=True)
        taken += len(mine)
print(taken, doubled, flush=True)
"""


def test_under_contention_no_key_has_two_owners(tmp_path):
    processes = [python(CONTENDER, tmp_path, 1.0, *KEYS) for _ in range(3)]
    counts = [process.communicate("\n")[0].split() for process in start_together(processes)]
    assert all(int(taken) > 20 for taken, _ in counts)
    assert [doubled for _, doubled in counts] == ["0", "0", "0"]
    assert files(tmp_path) == []


def start_together(processes):
    for process in processes:
        print(file=process.stdin, flush=True)
    return processes


def test_a_void_claim_is_stolen_by_one(tmp_path):
    keys = [a_key(i) for i in range(300)]
    dead = python("pass")
    dead.communicate()
    for key in keys[::2]:
        plant(tmp_path, key, machine=claims_module.machine(), pid=dead.pid, start="1")
    for key in keys[1::2]:
        os.utime(plant(tmp_path, key), (1, 1))
    processes = start_together([python(TAKER, tmp_path, *keys) for _ in range(3)])
    taken = [set(process.stdout.readline().split()) for process in processes]
    assert all(not one & other for one, other in itertools.combinations(taken, 2))
    with Claims(tmp_path) as ours:
        assert ours.held(keys) == set().union(*taken)
        assert ours.take(keys) | set().union(*taken) == set(keys)
        for process in processes:
            process.communicate("\n")
        assert ours.take(keys) == set(keys)
    assert files(tmp_path) == []


def test_a_wrongly_moved_claim_is_put_back(tmp_path, monkeypatch):
    """As between hosts that do not see each other's locks: another one stole and took it a moment before us."""
    path = plant(tmp_path, KEYS[0])
    os.utime(path, (1, 1))
    rename = os.rename

    def late(source, target):
        path.unlink()
        plant(tmp_path, KEYS[0], token="faster")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with Claims(tmp_path) as ours:
        assert ours.take(KEYS[:1]) == set()
    assert files(tmp_path) == [path]
    assert json.loads(path.read_text())["token"] == "faster"


def test_what_another_host_removes_while_it_is_read_is_gone(tmp_path, monkeypatch):
    """NFS then says ESTALE, at the read rather than at the opening."""

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    plant(tmp_path / "claims", a_key(1))
    fill(tmp_path / "scores")
    claims = Claims(tmp_path / "claims")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        assert claims.take([a_key(1)]) == set()
    claims.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        assert loaded(tmp_path / "scores").picture(a_key(1)) is None
        patch.setattr(Path, "read_bytes", lambda path: os.close(-1))
        with pytest.raises(OSError, match="Bad file descriptor"):  # any other fault of the file system is told
            loaded(tmp_path / "scores")
    assert loaded(tmp_path / "scores").picture(a_key(1)) == a_picture(1)


def test_claims_are_cheap(tmp_path):
    keys = [a_key(i) for i in range(32)]
    best = math.inf
    with Claims(tmp_path) as ours:
        for _ in range(10):
            began = time.perf_counter()
            ours.take(keys)
            ours.release(keys)
            best = min(best, time.perf_counter() - began)
    assert best < 0.02  # a few ms where nothing else runs


# --- facts and scores

METRICS = {"clip": "ViT-B", "ssim": "window 7"}


def a_picture(i: int, digest: int | None = None, reason: str = "") -> Picture:
    return Picture(1000 + i, 1_700_000_000_000_000_000 + i, a_key(i if digest is None else digest), reason)


def loaded(folder: Path, metrics: dict[str, str] | None = None) -> Scores:
    scores = Scores(folder, METRICS if metrics is None else metrics)
    scores.load()
    return scores


def fill(folder: Path, count: int = 5) -> Scores:
    """Image 0 is the baseline of images 0 to count - 1."""
    scores = loaded(folder)
    for i in range(count):
        scores.add_picture(a_key(i), a_picture(i))
    for i in range(count):
        scores.add_values(a_key(i), a_key(0), {"clip": i / 7, "ssim": -i})
    scores.flush()
    return scores


def test_facts_and_scores_come_back_to_the_bit(tmp_path):
    before = fill(tmp_path)
    before.add_picture(a_key(9), a_picture(9, reason="schwarz ⚫"))
    before.add_values(a_key(9), a_key(0), {"clip": math.inf})
    before.flush()
    for scores in (before, loaded(tmp_path)):
        assert scores.picture(a_key(4)) == a_picture(4)
        assert scores.picture(a_key(9)) == a_picture(9, reason="schwarz ⚫")
        assert scores.picture(a_key(5)) is None
        assert scores.values(a_key(3), a_key(0)) == {"clip": 3 / 7, "ssim": -3.0}
        assert scores.values(a_key(3), a_key(1)) == {}  # another baseline
        assert scores.values(a_key(9), a_key(0)) == {"clip": math.inf}
        assert scores.values(a_key(5), a_key(0)) == scores.values(a_key(0), a_key(5)) == {}
    count = len(files(tmp_path))
    before.flush()
    assert len(files(tmp_path)) == count == 5


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("changed", "void"), [(3, {3}), (0, {0, 1, 2, 3, 4})])
def test_scores_of_other_pixels_are_void(tmp_path, changed, void, saved):
    scores = fill(tmp_path)
    scores.add_picture(a_key(2), Picture(1, 2, a_key(2), ""))  # the same pixels in another file
    scores.add_picture(a_key(changed), a_picture(changed, digest=77))
    if saved:
        scores.flush()
        scores = loaded(tmp_path)
    assert scores.picture(a_key(changed)).digest == a_key(77)
    assert {i for i in range(5) if not scores.values(a_key(i), a_key(0))} == void
    scores.add_picture(a_key(changed), a_picture(changed))  # made again, as it was
    assert all(scores.values(a_key(i), a_key(0)) for i in range(5))


def test_another_metric_leaves_the_others_alone(tmp_path):
    fill(tmp_path)
    old = set(files(tmp_path))
    scores = loaded(tmp_path, {**METRICS, "lpips/alex": "v0.1"})
    assert scores.values(a_key(1), a_key(0)) == {"clip": 1 / 7, "ssim": -1.0}
    scores.add_values(a_key(1), a_key(0), {"lpips/alex": 0.5})
    scores.flush()
    (new,) = set(files(tmp_path)) - old
    assert new.parent.name.startswith("lpips_alex-")
    assert loaded(tmp_path, {"lpips/alex": "v0.1"}).values(a_key(1), a_key(0)) == {"lpips/alex": 0.5}
    assert loaded(tmp_path, {"clip": "ViT-L", "ssim": "window 7"}).values(a_key(1), a_key(0)) == {"ssim": -1.0}
    with pytest.raises(KeyError, match="psnr"):
        scores.add_values(a_key(1), a_key(0), {"psnr": 1.0})
    with pytest.raises(KeyError, match="no facts"):
        scores.add_values(a_key(20), a_key(0), {"clip": 1.0})


def test_a_failed_metric_is_not_noted(tmp_path):
    scores = fill(tmp_path, 2)
    scores.add_picture(a_key(2), a_picture(2))
    scores.add_values(a_key(2), a_key(0), {"clip": math.nan, "ssim": np.float32(0.5)})
    scores.add_values(a_key(1), a_key(0), {"clip": math.nan})
    scores.flush()
    again = loaded(tmp_path)
    assert again.values(a_key(2), a_key(0)) == {"ssim": 0.5}
    assert again.values(a_key(1), a_key(0)) == {"clip": 1 / 7, "ssim": -1.0}


@pytest.mark.parametrize("damage", ["shorter", "empty", "bit", "zeros"])
def test_a_damaged_part_is_noticed_and_the_rest_stays(tmp_path, caplog, damage):
    scores = fill(tmp_path)
    for i in (10, 11):  # one part each
        scores.add_picture(a_key(i), a_picture(i))
        scores.add_values(a_key(i), a_key(0), {"clip": float(i)})
        scores.flush()
    victim = sorted((tmp_path / parts_module._folder_name("clip", "ViT-B")).iterdir())[1]
    whole = victim.read_bytes()
    middle = len(whole) // 2
    broken = {
        "shorter": whole[:-1],
        "empty": b"",
        "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zeros": bytes(len(whole)),
    }
    victim.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        scores = loaded(tmp_path)
    assert str(victim) in caplog.text
    assert not victim.exists()
    assert scores.values(a_key(10), a_key(0)) == {}
    assert scores.values(a_key(11), a_key(0)) == {"clip": 11.0}
    assert scores.values(a_key(4), a_key(0)) == {"clip": 4 / 7, "ssim": -4.0}
    caplog.clear()
    loaded(tmp_path)
    assert caplog.text == ""


def test_what_could_not_be_written_is_written_later(tmp_path):
    scores = loaded(tmp_path / "scores")
    scores.add_picture(a_key(0), a_picture(0))
    (tmp_path / "scores").write_text("in the way")
    with pytest.raises(OSError, match="scores"):
        scores.flush()
    (tmp_path / "scores").unlink()
    scores.add_picture(a_key(1), a_picture(1))
    scores.flush()
    again = loaded(tmp_path / "scores")
    assert [again.picture(a_key(i)) for i in range(2)] == [a_picture(0), a_picture(1)]


def test_many_parts_become_one_and_the_latest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "MANY", 6)
    scores = fill(tmp_path, 2)
    for turn in range(9):
        scores.add_picture(a_key(1), a_picture(1, digest=turn + 50))
        scores.flush()
    pictures = tmp_path / "pictures"
    (pictures / "notes.parquet").write_text("not ours")
    assert loaded(tmp_path).picture(a_key(1)).digest == a_key(58)
    names = {path.name for path in pictures.iterdir()}
    assert len(names) == 2 and "notes.parquet" in names
    again = loaded(tmp_path)
    assert again.picture(a_key(1)).digest == a_key(58)
    assert again.picture(a_key(0)) == a_picture(0)
    again.add_picture(a_key(1), a_picture(1))  # later than the merged part
    again.flush()
    assert loaded(tmp_path).values(a_key(1), a_key(0)) == {"clip": 1 / 7, "ssim": -1.0}


def test_loading_again_keeps_what_is_not_written_yet(tmp_path):
    scores, other = fill(tmp_path, 2), loaded(tmp_path)
    other.add_picture(a_key(7), a_picture(7))
    scores.add_picture(a_key(8), a_picture(8))
    scores.flush()
    other.load()
    assert [other.picture(a_key(i)) for i in (1, 7, 8)] == [a_picture(i) for i in (1, 7, 8)]


def test_what_is_written_costs_little_memory(tmp_path):
    """A study of a million images must not hold its million records as Python objects."""
    scores, count = loaded(tmp_path), 20_000
    tracemalloc.start()
    try:
        for i in range(count):
            scores.add_picture(a_key(i), a_picture(i))
            scores.add_values(a_key(i), a_key(0), {"clip": i / 7, "ssim": -i})
            if i % 2048 == 2047:
                scores.flush()
        scores.flush()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 500 * count
    assert scores.picture(a_key(77)) == a_picture(77)
    assert scores.values(a_key(count - 1), a_key(0)) == {"clip": (count - 1) / 7, "ssim": 1.0 - count}
    scores.add_picture(a_key(77), a_picture(77, digest=5))  # a later record wins, before it is written and after
    for _ in range(2):
        assert scores.picture(a_key(77)) == a_picture(77, digest=5) and scores.values(a_key(77), a_key(0)) == {}
        scores.flush()


APPENDER = """
import sys
from pathlib import Path
from lesion.store import scores as parts
from lesion.store.scores import Picture, Scores
folder, offset, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
parts.MANY = 5
scores = Scores(folder, {"m": "1"})
sys.stdin.readline()
for i in range(offset, offset + count):
    key = f"{i:032x}"
    scores.add_picture(key, Picture(i, i, key, ""))
    scores.add_values(key, key, {"m": i / 3})
    scores.flush()
    if i % 7 == 0:
        scores.load()
        missing = [j for j in range(offset, i + 1) if scores.values(f"{j:032x}", f"{j:032x}") != {"m": j / 3}]
        assert not missing, missing
"""


def test_merging_among_appending_processes_loses_no_row(tmp_path):
    processes = start_together([python(APPENDER, tmp_path, 1000 * n, 40) for n in range(3)])
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    scores = loaded(tmp_path, {"m": "1"})
    for i in itertools.chain(range(40), range(1000, 1040), range(2000, 2040)):
        key = f"{i:032x}"
        assert scores.values(key, key) == {"m": i / 3}
        assert scores.picture(key) == Picture(i, i, key, "")
    assert len(files(tmp_path)) < 120  # it did merge
