"""The specification of data/: what becomes of files, of frames and of actions, and how the balls move.

Videos are made by ffmpeg itself, other files by NumPy and Pillow: what is read is compared with what went in.
"""

import hashlib
import itertools
import os
import subprocess
import tracemalloc

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from imageio.plugins.ffmpeg import get_exe
from PIL import Image  # comes with imageio

from data import clips as module
from data.balls import Balls, bouncing_balls
from data.clips import Clips, read_actions, read_clip, side_file, to_bytes, to_frames, video_writer

pytestmark = pytest.mark.data


def balls(n=1, frames=8, size=16, seed=0, **options):
    return bouncing_balls(n, frames, np.random.default_rng(seed), size, **options)


def encode(path, clip, *options, before=(), codec="libx264"):
    """Writes a video of 15 frames/s with ffmpeg, without the code that is tested here."""
    words = f"-v error -y -f rawvideo -pix_fmt rgb24 -s {clip.shape[2]}x{clip.shape[1]} -r 15 -i -".split()
    command = [get_exe(), *before, *words, "-c:v", codec, "-pix_fmt", "yuv420p", *options, str(path)]
    subprocess.run(command, input=clip.tobytes(), check=True)


def write(path, clip, **options):
    with video_writer(path, *clip.shape[1:3], **options) as put:
        for frame in clip:
            put(frame)


def save(folder, **clips):
    """-> the folder, with these arrays as .npy; a number becomes a clip of 4 frames of that grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, clip in clips.items():
        np.save(folder / f"{name}.npy", np.full((4, 8, 8, 3), clip, np.uint8) if np.isscalar(clip) else clip)
    return folder


def clips_of(folder, height=8, width=8, num_frames=4, stride=1):
    return Clips(folder, height, width, num_frames, stride, cache=folder.parent / "cache", quiet=True)


def greys(data, n=200, held=False):
    return set(data.batch(np.random.default_rng(0), n, 1, held)[0][:, 0, 0, 0, 0].tolist())


def refused(path, error, call, *args):
    """Fails unless the call raises this error, in one line that names the path."""
    with pytest.raises(error) as raised:
        call(*args)
    said = str(raised.value)
    assert str(path) in said and "\n" not in said, f"one line that names {path} is needed, not: {said}"


def told(capsys, path):
    """Fails unless one line was printed, which names the path."""
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(path) in said[0], f"one line that names {path} is needed, not: {said}"
    return said[0]


# ---- the balls ------------------------------------------------------------------------------------------------------


def covers(clips):
    """How much of each pixel is red ball, and blue ball: (..., H, W, ball)."""
    return (clips.astype(float) - [12, 14, 20]) @ np.linalg.pinv(np.array([[230, 70, 0], [0, 110, 225]]))


def fly(clips):
    """Places (N, T, ball, xy), distances (N, T) of the balls; in which steps (N, T - 1) nothing is near them."""
    cover, (y, x) = covers(clips), np.mgrid[: clips.shape[2], : clips.shape[3]] + 0.5
    p = np.stack([(cover * axis[..., None]).sum((2, 3)) / cover.sum((2, 3)) for axis in (x, y)], -1)
    apart = np.linalg.norm(p[:, :, 0] - p[:, :, 1], axis=-1)
    far = (np.minimum(p, len(x) - p).min((2, 3)) > 5.1) & (apart > 9)
    return p, apart, far[:, 1:] & far[:, :-1]


def test_balls_keep_their_energy_and_stay_inside():
    clips = balls(8, 77, 32)
    assert abs(covers(clips).sum((2, 3)) / (np.pi * 3.5**2) - 1).max() < 0.05, "both balls are whole in every frame"
    p, apart, _ = fly(clips)
    assert 6.7 < apart.min() < 7.1, "balls of radius 3.5 meet, and do not pass through each other"
    energy = np.median((np.diff(p, axis=1) ** 2).sum((2, 3)).reshape(8, 4, 19), -1)  # in each quarter of each clip
    assert np.allclose(energy, energy[:, :1], rtol=0.03), "walls and collisions hand energy on and lose none"


def test_places_and_speeds_are_drawn_in_a_fixed_order():
    rng, (p, _, free) = np.random.default_rng(7), fly(balls(40, 2, 32, seed=7))
    angle, speed = rng.uniform(0, 2 * np.pi, (40, 2)), rng.uniform(0.6, 1.5, (40, 2))
    place = rng.uniform(3.5, 32 - 3.5, (40, 2, 2))
    first = np.linalg.norm(place[:, 0] - place[:, 1], axis=-1) > 7  # the others were drawn once more
    assert np.allclose(p[first, 0], place[first], atol=0.03), "README's figures hold for these draws: keep their order"
    v, free = speed[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1), first & free[:, 0]
    assert free.sum() > 3 and np.allclose((p[:, 1] - p[:, 0])[free], v[free], atol=0.05), "0.6 to 1.5 pixels a frame"
    refused("12", ValueError, Balls(12).batch, rng, 1, 2)


@pytest.mark.parametrize("dx,dy", [d for d in itertools.product((-1, 0, 1), repeat=2) if any(d)])
def test_a_push_turns_the_red_ball_before_it_moves(dx, dy):
    push = np.zeros((24, 7, 2))
    push[:, 0], push[:, 4] = (-dy, dx), (dx, dy)
    plain, pushed = balls(24, 7, 48, seed=2), balls(24, 7, 48, seed=2, push=push)
    assert (plain[:, :4] == pushed[:, :4]).all(), "a push of frame 4 changes no frame before, that of frame 0 nothing"
    (p, _, a), (still, _, b) = fly(pushed), fly(plain)
    free = a[:, 3:].all(1) & b[:, 3:].all(1)
    steps, wanted = np.diff(p, axis=1)[free, 3:, 0], np.array([dx, dy]) / np.hypot(dx, dy)
    assert len(steps) and np.allclose(steps, wanted, atol=0.05), "it goes on at 1 pixel a frame, from frame 4 on"
    assert np.allclose(p[free][:, :, 1], still[free][:, :, 1], atol=0.05), "the blue ball is not pushed"


def test_training_draws_pushes_and_one_argument_leaves_them_out():
    data, plain = Balls(32), Balls(32, push=False)
    clips, push = data.batch(np.random.default_rng(0), 200, 16)
    assert data.action_dim == 2 and push.shape == (200, 16, 2) and push.dtype == np.float32, "an action is (dx, dy)"
    pushed = push[push.any((1, 2))]
    assert 80 < len(pushed) < 120, "half of the clips have no push"
    counts = np.unique(pushed.reshape(-1, 2), axis=0, return_counts=True)[1] / (len(pushed) * 16)
    expected = np.full(9, 1 / 36) + [0, 0, 0, 0, 3 / 4, 0, 0, 0, 0]
    assert np.allclose(counts, expected, atol=0.015), "in the others in one frame of four, uniform over nine directions"
    (p, _, free), push = fly(clips), push[:, 1:]
    off = np.diff(p, axis=1)[:, :, 0] - push / np.maximum(np.linalg.norm(push, axis=-1, keepdims=True), 1)
    free &= push.any(-1)
    assert free.sum() > 20 and abs(off[free]).max() < 0.1, "row t is the push that leads to frame t"
    clips, push = plain.batch(np.random.default_rng(0), 3, 8, held=True)
    assert plain.held_out and plain.action_dim == 0 and push.shape == (3, 8, 0), "without pushes there are no actions"
    assert (clips == balls(3, 8, 32)).all(), "and the clips are those of the simulator"


# ---- reading --------------------------------------------------------------------------------------------------------


def test_bytes_survive_the_round_trip():
    clip = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert (to_bytes(to_frames(clip)) == clip).all(), "uint8 -> [-1, 1] -> uint8 must be exact: round"
    x = to_frames(np.array([[[[0, 255, 51]]]], np.uint8))
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, 1, -0.6]), "channels first, -1 to 1"
    assert to_bytes(torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1)).flatten().tolist() == [0, 255], "clamp, do not wrap"


def test_images_are_ordered_by_number_and_may_be_of_any_kind(tmp_path):
    (tmp_path / "._frame0.png").write_bytes(b"hidden")  # macOS leaves such files on other disks
    for i in range(12):
        kind = (".png", ".jpg", ".bmp")[i % 3]
        iio.imwrite(tmp_path / f"frame{i}{kind}", np.full((4, 6 + i, 3), 20 * i, np.uint8))
    read = read_clip(tmp_path, 4, 4)[:, 0, 0, 0].astype(int)
    assert abs(read - 20 * np.arange(12)).max() <= 2, "frame2 before frame10; images of any kind and size"
    assert len(read_clip(tmp_path, 4, 4, 5)) == 5, "the first images alone"
    deep, photos = save(tmp_path / "deep"), save(tmp_path / "photos")
    for i, value in enumerate((0, 25_856, 65_535)):
        iio.imwrite(deep / f"{i}.png", np.full((4, 4), value, np.uint16))
    assert read_clip(deep, 4, 4)[:, 0, 0].tolist() == [[0] * 3, [100] * 3, [255] * 3], "16 bits / 257, grey to RGB"
    photo, exif = np.arange(0, 240, 30, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(3, 2), Image.Exif()
    exif[0x0112] = 3  # held upside down
    Image.fromarray(photo).save(photos / "0.png", exif=exif)
    assert (read_clip(photos, 8, 8)[0] == photo[::-1]).all(), "EXIF orientation: photos are turned upright"


def test_what_is_transparent_is_black_and_grey_is_rgb(tmp_path):
    frames = np.full((3, 8, 8, 4), 255, np.uint8)
    frames[..., :3] = np.array([50, 100, 200])[:, None, None, None]
    frames[:, :, 4:, 3] = 0  # the right half shows what is behind
    pictures, grey = ([Image.fromarray(image) for image in clip] for clip in (frames, frames[..., 0]))
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], disposal=2)
    grey[0].save(tmp_path / "grey.gif", save_all=True, append_images=grey[1:])
    black = frames[..., :3] * (np.arange(8) < 4)[:, None]
    for path in (tmp_path, tmp_path / "a.gif"):
        assert (read_clip(path, 8, 8) == black).all(), f"{path.name}: colours that nobody sees flicker"
    read = read_clip(tmp_path / "grey.gif", 8, 8)
    assert read[:, 0, 0].tolist() == [[50] * 3, [100] * 3, [200] * 3], "three channels"


def test_npy_is_read_as_it_is_and_only_as_far_as_needed(tmp_path):
    clip = np.random.default_rng(0).integers(1, 256, (300, 8, 8, 3), np.uint8)
    floats = (clip - np.float32(0.4)) / 255
    save(tmp_path, a=clip, floats=floats, long=np.zeros((600, 64, 64, 3), np.float32))  # 29 MB
    for name in ("a", "floats"):
        assert (read_clip(tmp_path / f"{name}.npy", 8, 8) == clip).all(), f"{name}: pixels as they are, floats rounded"
    tracemalloc.start()
    assert len(read_clip(tmp_path / "long.npy", 8, 8, 4)) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, f"{peak / 1e6:.0f} MB for four frames: the whole file was loaded"


@pytest.mark.parametrize("height,width,kept", [(4, 4, (3, 7)), (4, 8, (1, 9)), (4, 10, (0, 10)), (8, 10, (2.5, 7.5))])
def test_frames_are_scaled_to_cover_and_cropped_to_the_centre(tmp_path, height, width, kept):
    ramp = np.broadcast_to(np.arange(0, 240, 24, dtype=np.uint8)[:, None], (2, 4, 10, 3))  # column i is 24 i
    save(tmp_path, a=ramp)
    encode(tmp_path / "a.mp4", ramp.repeat(8, 1).repeat(8, 2))
    left, right = (24 * (edge - 0.5) for edge in kept)  # values at the edges, half a column out
    expected = np.clip(left + (right - left) / width * (np.arange(width) + 0.5), 0, 216)
    for name in ("a.npy", "a.mp4"):
        row = read_clip(tmp_path / name, height, width)[0, height // 2, :, 0].astype(float)
        assert abs(row - expected).max() < 13, f"{name}: columns {kept} of 10 should fill {height}x{width}, not {row}"


def test_smaller_frames_are_averages(tmp_path):
    checks = np.uint8(255 * (np.indices((8, 64, 64)).sum(0) % 2))[..., None].repeat(3, 3)
    save(tmp_path, a=checks)
    encode(tmp_path / "a.mkv", checks, "-crf", "1")
    for name in ("a.npy", "a.mkv"):
        assert abs(read_clip(tmp_path / name, 16, 16) - 127.5).max() < 25, f"{name}: averages, not single pixels"


def test_pixels_that_are_not_square_and_turned_pictures_are_shown_right(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[:, None], (3, 40, 40, 3))
    encode(tmp_path / "a.mp4", ramp)
    encode(tmp_path / "wide.mp4", ramp, "-vf", "setsar=2")  # is to be shown as 40x80
    row = read_clip(tmp_path / "wide.mp4", 40, 40)[0, 20, :, 0]
    assert abs(row[[0, -1]] - [60.0, 177.0]).max() < 8, "its middle half fills a square: all of it would be squashed"
    turn = [get_exe(), *"-v error -display_rotation 90 -i a.mp4 -c copy turned.mp4".split()]
    subprocess.run(turn, cwd=tmp_path, check=True)
    column = read_clip(tmp_path / "turned.mp4", 40, 40)[0, :, 20, 0].astype(int)
    assert abs(column[0] - column[-1]) > 180, "a telephone that was turned says so in the file"


@pytest.mark.parametrize("name,codec", [("a.mkv", "libx264"), ("a.m4v", "libx264"), ("a.webm", "libvpx-vp9")])
def test_every_coded_frame_of_a_video_comes_through(tmp_path, capsys, name, codec):
    rate = ["-vf", "select='lt(n,10)+not(mod(n,6))'", "-fps_mode", "vfr", "-output_ts_offset", "7"]  # a late clock
    sound = "-f lavfi -t 9 -i anullsrc".split()  # it goes on when the pictures have ended
    encode(tmp_path / name, balls(1, 40, 32)[0], *rate, before=sound, codec=codec)
    assert len(read_clip(tmp_path / name, 32, 32)) == 15, "frames were repeated, dropped, or refused for their times"
    assert len(read_clip(tmp_path / name, 32, 32, 3)) == 3, f"{name}: the first frames alone"
    encode(tmp_path / name, balls(1, 20, 32)[0], "-bsf:v", "setts=ts=floor(N/2)*40", "-bf", "0", codec=codec)
    assert len(read_clip(tmp_path / name, 32, 32)) == 20, "two frames at one time are two frames"
    assert not capsys.readouterr().out, "and no reason to complain"


@pytest.mark.parametrize("name,codec", [
    ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_frames_before_a_break_are_used_and_one_line_says_so(tmp_path, capsys, name, codec):
    path = tmp_path / name
    encode(path, balls(1, 100, 64)[0], *["-movflags", "faststart"] * (name == "a.mp4"), codec=codec)
    whole, data = read_clip(path, 32, 32), path.read_bytes()
    assert len(whole) == 100 and not capsys.readouterr().out, "nothing is said of a whole file"
    at = len(data) * 3 // 4
    scratched = data[:at] + bytes(255 - b for b in data[at : at + 200]) + data[at + 200 :]
    for damaged in (data[:at], scratched)[: 1 + (name in ("a.avi", "a.mp4"))]:  # the others go on after a scratch
        path.write_bytes(damaged)
        read = read_clip(path, 32, 32)
        assert 40 < len(read) < 90, f"{name}: all frames before the break, and none after it, not {len(read)}"
        assert (read[:-1] == whole[: len(read) - 1]).all(), "those of the whole file; only the last may be damaged"
        told(capsys, path)


def test_what_has_no_frame_is_refused(tmp_path):
    clip = np.zeros((8, 8, 8, 3))
    save(tmp_path, nan=clip * np.nan, large=clip + 1.5, ints=clip.astype(int), objects=np.array([{}] * 8),
         few=clip[:0].astype(np.uint8), grey=clip[..., 0].astype(np.uint8))
    texts = {"text.mp4": "no video", "empty.mp4": "", "cut.gif": "GIF89a", "empty.npy": "",  # two open another file
             "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n",
             "script.mp4": "ffconcat version 1.0\nfile real.mp4\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    encode(tmp_path / "real.mp4", balls(1, 4)[0])
    (tmp_path / "dead.mp4").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("pipe.mp4", "pipe.npy"):  # whoever opens one waits for ever
        os.mkfifo(tmp_path / name)
    for path in {*tmp_path.iterdir()} - {tmp_path / "real.mp4"}:
        refused(path, ValueError, read_clip, path, 8, 8)


def test_a_bad_image_is_told_by_name_and_ends_the_clip(tmp_path, capsys):
    for i in range(3):
        iio.imwrite(tmp_path / f"{i}.png", np.full((8, 8, 3), 40 * i, np.uint8))
    bad, good = tmp_path / "1.png", (tmp_path / "0.png").read_bytes()
    for make in (lambda: bad.write_bytes(good[:40]), lambda: os.mkfifo(bad)):
        bad.unlink()
        make()
        assert len(read_clip(tmp_path, 8, 8)) == 1, "the image before it is used"
        told(capsys, bad)
    bad.unlink()
    Image.open(tmp_path / "0.png").save(bad, save_all=True, append_images=[Image.open(tmp_path / "2.png")])
    assert read_clip(tmp_path, 8, 8).shape == (3, 8, 8, 3), "one frame for each image, also of an animated one"


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 255"])  # ffmpeg makes 255 of SIGTERM
def test_a_killed_ffmpeg_is_no_short_clip(tmp_path, monkeypatch, end):
    clips, ffmpeg = save(tmp_path / "clips"), tmp_path / "ffmpeg"
    (clips / "a.mp4").write_bytes(b"a video")
    ffmpeg.touch(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    ffmpeg.write_text(f"#!/bin/sh\nhead -c 1000 /dev/zero\n{end}\n")  # five frames, and a part of one
    refused(clips / "a.mp4", OSError, clips_of, clips)
    assert not os.listdir(tmp_path / "cache"), "five frames were taken for the whole clip, and kept"
    for lines in ("cat > /dev/null", "head -c 9 > /dev/null"):
        ffmpeg.write_text(f"#!/bin/sh\n{lines}\n{end}\n")
        refused("o.mp4", OSError, write, tmp_path / "o.mp4", np.zeros((99, 40, 40, 3), np.uint8))


def test_without_ffmpeg_one_line_says_what_helps(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg on your system,\nor set IMAGEIO_FFMPEG_EXE.")

    clips = save(tmp_path / "clips")
    (clips / "a.mp4").write_bytes(b"a video")
    monkeypatch.setattr(module, "get_exe", missing)
    for call, *args in ((clips_of, clips), (read_clip, clips / "a.mp4", 8, 8), (write, tmp_path / "o.gif", balls()[0])):
        refused("pip install", OSError, call, *args)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".mp4", ".webm", ".GIF"])
def test_what_is_written_can_be_read_again(tmp_path, suffix):
    clip, path = balls(1, 20, 32)[0], tmp_path / f"a{suffix}"
    write(path, clip, fps=24)
    read = read_clip(path, 32, 32).astype(int)
    assert read.shape == clip.shape, f"{suffix}: frames got lost, or their size changed"
    assert abs(read - clip).mean() < 4, f"{suffix}: other frames than were written"
    if suffix == ".npy":
        assert np.array_equal(np.load(path), clip), ".npy keeps every bit, and is not enlarged"
    elif suffix == ".GIF":
        with Image.open(path) as gif:
            shown = [gif.seek(i) or gif.info["duration"] for i in range(20)]
        assert abs(np.mean(shown) - 1000 / 24) < 1, "the hundredths of a second fit on average"
        assert gif.info["loop"] == 0, "it is shown for ever"
    else:
        assert iio.immeta(path, plugin="FFMPEG")["fps"] == 24, "the rate that was asked for"


def test_a_gif_is_not_faster_than_it_can_be(tmp_path, capsys):
    write(tmp_path / "a.gif", balls(1, 12)[0], fps=120)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (12, 20), "all frames, 50 in a second"
    told(capsys, tmp_path / "a.gif")


def test_small_pixels_are_enlarged_and_stay_sharp(tmp_path):
    clip = np.random.default_rng(0).integers(0, 2, (2, 8, 8, 1), np.uint8).repeat(3, 3) * 255  # black and white
    write(tmp_path / "a.mp4", clip)
    read = iio.imread(tmp_path / "a.mp4")
    assert ((read > 64) & (read < 192)).mean() < 0.03, "black and white, no grey: repeat pixels, do not blend them"
    for size, shown in (((100, 8), (300, 24)), ((256, 8), (256, 8)), ((301, 9), (302, 10)), ((85, 7), (340, 28))):
        write(tmp_path / "a.webm", np.zeros((2, *size, 3), np.uint8))
        is_shown = iio.imread(tmp_path / "a.webm", index=0).shape[:2]
        assert is_shown == shown, f"{size}: a whole factor to 256 rows or more, even sizes: {shown}, not {is_shown}"


def test_frames_go_to_the_file_as_they_come(tmp_path):
    frame = np.zeros((64, 64, 3), np.uint8)
    with video_writer(tmp_path / "a.npy", 64, 64) as put:
        for _ in range(100):
            put(frame)
        assert (tmp_path / "a.npy").stat().st_size > 95 * frame.nbytes, "frames pile up in memory"
    for name in ("b.npy", "b.mp4"):
        with pytest.raises(KeyboardInterrupt), video_writer(tmp_path / name, 64, 64) as put:
            put(frame)
            raise KeyboardInterrupt
        assert len(read_clip(tmp_path / name, 64, 64)) == 1, f"{name}: what came before Ctrl-C is a whole file"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("suffix", [".npy", ".mp4", ".webm", ".gif"])
def test_a_full_disk_is_an_error(tmp_path, suffix):
    (tmp_path / f"a{suffix}").symlink_to("/dev/full")
    refused("o space left", OSError, write, tmp_path / f"a{suffix}", np.zeros((3, 64, 64, 3), np.uint8))


# ---- actions --------------------------------------------------------------------------------------------------------


def test_actions_have_the_name_of_their_clip_and_are_averaged_over_a_stride(tmp_path):
    (tmp_path / "take.1").mkdir()
    for name in ("take.1", "take.1.mp4"):
        side = side_file(tmp_path / name)
        assert side == tmp_path / "take.1.actions.npy", f"{name}: a video without its ending, a folder as it is"
    np.save(side, np.arange(6)[:, None])
    rows = read_actions(side, stride=2)
    assert rows.dtype == np.float32 and rows[::2, 0].tolist() == [0, 1.5, 3.5], "the means of rows (1, 2) and (3, 4)"
    assert read_actions(side)[:, 0].tolist() == [0, 1, 2, 3, 4, 5], "without a stride, each row is its own"


@pytest.mark.parametrize("what,actions", [
    ("not finite", np.full((4, 1), np.nan)), ("complex", np.ones((4, 1), complex)), ("text", np.full((4, 1), "1")),
    ("one axis", np.ones(4)), ("no number in a row", np.ones((4, 0))), ("too few rows", np.ones((3, 1))), ("a pipe", 0),
    ("a dead link", 0), ("nanoseconds in column 2", np.array([[0, 1, 1.7e18 + 3e7 * t] for t in range(4)]))])
def test_a_clip_with_bad_actions_is_skipped(tmp_path, capsys, what, actions):
    side = save(tmp_path / "clips", a=10) / "a.actions.npy"
    if what == "a pipe":
        os.mkfifo(side)  # whoever opens it waits for ever
    elif what == "a dead link":
        side.symlink_to("nowhere")
    else:
        np.save(side, actions)
    refused(tmp_path / "clips", ValueError, clips_of, tmp_path / "clips")
    said = told(capsys, side)
    assert "column 2" not in what or "2" in said.partition("column")[2], f"which column is it? {said}"


# ---- a folder of clips ----------------------------------------------------------------------------------------------


def test_all_that_looks_like_a_clip_is_used_or_told(tmp_path, capsys):
    clips = save(tmp_path / "clips", a=10, b=np.zeros((3, 8, 8, 3), np.uint8))
    save(clips / "deep", rollout_3=20)
    for folder, images in ((save(clips / "images", beside=40), 50), (save(clips / "thumbnails", beside=41), 51)):
        for i in range(4):
            iio.imwrite(folder / f"{i}.png", np.full((8, 8, 3), images, np.uint8))
    for name in ("c.MP4", "thumbnails/d.mkv"):  # cameras write capitals
        encode(clips / name, np.full((4, 8, 8, 3), 30, np.uint8))
    (clips / "dead.mp4").symlink_to("nowhere")
    for name in ("text.3gp", "notes.txt", ".hidden.mp4", "model.preview.mp4", "model.rollout.mp4"):  # train.py's own
        (clips / name).write_text("no video")
    found = greys(clips_of(clips))
    assert {10, 20, 40, 41, 50} <= found, f"a clip is missing: {found}"
    assert 51 not in found, "beside a video, images are thumbnails"
    *said, last = capsys.readouterr().out.splitlines()
    for name in ("b.npy", "dead.mp4", "text.3gp"):
        assert sum(str(clips / name) in line for line in said) == 1, f"{name}: one line says why it is skipped: {said}"
    assert len(said) == 3 and last.startswith("7 clips") and "3 skipped, 5 other" in last, "thumbnails, notes: others"


def test_links_are_followed_and_every_clip_counts_once(tmp_path):
    real, clips = save(tmp_path / "real", a=10, b=20), save(tmp_path / "clips" / "sub").parent
    (clips / "link").symlink_to(real)
    (clips / "copy.npy").symlink_to(real / "a.npy")
    for name in ("loop", "sub/loop"):
        (clips / name).symlink_to(clips)  # glob would follow these for ever
    assert len(clips_of(clips).clips) == 2, "each clip once, however many links lead to it"


def test_the_cache_knows_what_a_clip_was_made_from(tmp_path, monkeypatch):
    clips, cache = tmp_path / "clips", tmp_path / "cache"
    for name, grey in (("a", 10), ("b", 20)):
        save(clips / name, x=grey)
        os.utime(clips / name / "x.npy", (1, 1))
    assert greys(clips_of(clips)) == {10, 20}, "files of one name, size and time: the path tells them apart"
    before = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert greys(clips_of(clips)) == {10, 20}
    assert before == {p: p.stat().st_mtime_ns for p in cache.iterdir()}, "a clip is decoded once"
    for size in ((4, 8), (8, 6)):
        shape = clips_of(clips, *size).batch(np.random.default_rng(0), 1, 4)[0].shape
        assert shape == (1, 4, *size, 3), "one size was taken for the other"
    save(clips / "a", x=30)
    os.utime(clips / "a" / "x.npy", (2, 2))
    assert greys(clips_of(clips)) == {30, 20}, "a clip that was written later was taken for the one before"
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])  # after a power failure
    assert greys(clips_of(clips)) == {30, 20}, "a damaged file in the cache is decoded anew"
    count = len(list(cache.iterdir()))
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    clips_of(clips)
    assert len(list(cache.iterdir())) == count + 2, "another way of reading decodes anew"
    inside = [Clips(clips, 8, 8, 4, cache=clips / "cache", quiet=True) for _ in range(2)]
    assert len(inside[1].clips) == 2, "what lies in --cache, inside --data, was taken for clips"


def test_a_long_clip_is_decoded_as_a_stream(tmp_path):
    clips = save(tmp_path / "clips", a=np.zeros((2000, 64, 64, 3), np.uint8))  # 25 MB
    tracemalloc.start()
    clips_of(clips, 64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, f"{peak / 1e6:.0f} MB: memory grows with the length of a clip"


def test_a_cache_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    clips, real = save(tmp_path / "clips", a=10), module.read_frames

    def full(*args):
        assert list(tmp_path.glob(f"cache/*.{os.getpid()}.*")), "each process needs a file of its own"
        yield from itertools.islice(real(*args), 2)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(module, "read_frames", full)
        refused(tmp_path / "cache", OSError, clips_of, clips)  # it is not the clip that is to blame
    assert not os.listdir(tmp_path / "cache"), "half a file is left behind"
    refused(clips / "a.npy", OSError, lambda: Clips(clips, 8, 8, 4, cache=clips / "a.npy", quiet=True))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    refused("--cache", ValueError, Clips, clips, 8, 8, 4)
    assert not os.path.exists("~"), "without a home folder, none of that name is made"


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    clips, two = save(tmp_path / "clips", a=10, b=20), save(tmp_path / "two", a=10, b=20)
    save(two, **{"a.actions": np.ones((4, 1)), "b.actions": np.ones((4, 2))})
    refused(two, ValueError, clips_of, two)  # actions of two widths
    for folder in (save(clips / "empty"), clips / "a.npy", clips / "none"):
        refused(folder, ValueError, clips_of, folder)
    for too_long in (dict(num_frames=5), dict(stride=2)):
        refused(clips, ValueError, lambda: clips_of(clips, **too_long))


def test_a_tenth_is_held_out_for_ever(tmp_path):
    part = lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256
    clips, names = save(tmp_path / "clips", **{f"c{i}": i for i in range(9)}), {i: f"c{i}.npy" for i in range(9)}
    assert not clips_of(clips).held_out, "of nine clips, each is needed"
    save(clips / "sub", c9=9)
    names[9] = "sub/c9.npy"
    held = {i for i in names if part(names[i]) < 0.1 or part(names[i]) == min(map(part, names.values()))}
    assert greys(clips_of(clips), held=True) == held, "of ten, those with a hash below .1, or the one with the least"
    save(clips / "sub", **{f"c{i}": i for i in range(10, 60)})
    names |= {i: f"sub/c{i}.npy" for i in range(10, 60)}
    data, held = clips_of(clips.rename(tmp_path / "moved")), {i for i in names if part(names[i]) < 0.1}
    assert len(held) > 2 and greys(data, 2000, held=True) == held, "a hash of the path: no clip moves another"
    assert greys(data, 2000) == {*names} - held, "and none is in both parts"


def test_a_training_clip_keeps_its_stride_and_its_actions(tmp_path):
    count = np.full((8, 8, 3, 7), 10 * np.arange(7), np.uint8).transpose(3, 0, 1, 2)  # frame t is 10 t
    clips = save(tmp_path / "clips", a=count, **{"a.actions": np.arange(7.0)[:, None]})
    data = clips_of(clips, num_frames=3, stride=2)
    batch, actions = data.batch(np.random.default_rng(0), 50, 3)
    at = batch[..., 0, 0, 0].astype(int) // 10
    assert (np.diff(at) == 2).all(), "--stride 2 takes every second frame"
    assert set(at[:, 0]) == {0, 1, 2}, "the first and the last place to start are both drawn"
    assert np.allclose(actions[..., 0], np.maximum(at - 0.5, 0)), "row t: the mean of the actions that led to frame t"
    batch, _ = data.batch(np.random.default_rng(0), 1, 9)
    assert (batch[0, -4:] == 60).all(), "too short for a preview: it stands still"


def test_long_clips_come_more_often_and_unknown_actions_are_not_zeros(tmp_path):
    clips = save(tmp_path / "clips", a=10, b=np.full((10, 8, 8, 3), 20, np.uint8), **{"a.actions": np.ones((4, 2))})
    batch, actions = clips_of(clips).batch(np.random.default_rng(0), 1000, 4)
    long = batch[:, 0, 0, 0, 0] == 20
    assert abs(long.mean() - 7 / 8) < 0.04, "10 frames have 7 places to start, 4 frames one: each is as likely"
    assert actions.shape == (1000, 4, 2) and actions.dtype == np.float32 and (actions[~long] == 1).all()
    assert np.isnan(actions[long]).all(), "a clip without a side file says nothing of its actions"
