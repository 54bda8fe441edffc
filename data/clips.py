"""Clips: files -> arrays (`read_clip`, `Clips`), and frames -> a video (`video_writer`)."""

import contextlib
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from imageio.plugins.ffmpeg import get_exe
from tqdm import tqdm

from diffusion_forcing import atomic_write, need

VERSION = 2  # goes up when decoded pixels change, so that the cache is made anew
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".3gp", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
NO_CLIPS = (".actions.npy", ".preview.mp4", ".rollout.mp4")  # the last two are train.py's
# What a video may be, whatever its name: no playlist and no script, which could open other files.
SAFE = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,avi,gif"]
CODECS = {  # for ffmpeg: the last filter, and options
    ".mp4": ("format=yuv420p", ["-c:v", "libx264", "-crf", "16"]),
    ".webm": ("format=yuv420p", ["-c:v", "libvpx-vp9", "-crf", "20", "-b:v", "0"]),
    ".gif": ("split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none", []),
}


def read_clip(path, height, width, limit=None):
    """A video, a .npy (T, H, W, 3) of uint8 or of floats in 0..1, or a folder of images -> uint8
    (T, height, width, 3): its first `limit` frames or all, scaled and cropped to the centre. Raises
    ValueError, with the path and the reason; OSError if ffmpeg is missing or was killed."""
    return np.stack([*itertools.islice(read_frames(path, height, width), limit)])


def read_frames(path, height, width):
    """-> the frames of `read_clip`, one by one. A clip ends where it breaks; a line says so."""
    count = 0
    try:
        for count, frame in enumerate(decode(Path(path), height, width), 1):
            x = torch.tensor(np.round(frame).astype(np.uint8)).movedim(-1, 0)  # (3,h,w)
            zoom = max(height / x.shape[1], width / x.shape[2])
            size = [max(height, round(x.shape[1] * zoom)), max(width, round(x.shape[2] * zoom))]
            yield TF.center_crop(TF.resize(x, size), [height, width]).movedim(0, -1).numpy()
        need(count, f"{path}: no frame in it, or no image in the folder")
    except ValueError as error:
        if not count:
            raise
        tqdm.write(f"{error}; {count} frames are used")


def decode(path, height, width):
    """-> the frames (h, w, 3) of a clip as they are, from 0 to 255; ffmpeg has already scaled those
    of a video, which is faster. Raises ValueError where the clip breaks."""
    if path.is_dir():
        yield from map(read_image, list_images(path))
    elif path.suffix.lower() == ".npy":
        clip = load_npy(path)
        floats = clip.dtype.kind == "f"
        need((floats or clip.dtype == np.uint8) and clip.shape[3:] == (3,) and clip.size,
             f"{path}: {clip.dtype} {clip.shape}, not uint8/float (T, H, W, 3)")
        for frame in clip:
            need(not floats or ((frame >= 0) & (frame <= 1)).all(), f"{path}: floats not in 0..1")
            yield frame * 255 if floats else frame
    else:
        yield from read_video(path, height, width)


def list_images(folder):
    """The images of a folder, hidden ones left out, frame2 before frame10."""
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
    return sorted(images, key=lambda p: re.sub(r"\d+", lambda n: n[0].zfill(20), p.name))


def read_image(path):
    """-> (h, w, 3), turned upright; what is transparent becomes black. Raises ValueError."""
    try:
        need(path.is_file(), "not a file")
        with iio.imopen(path, "r", plugin="pillow") as file:
            if file.metadata(index=0)["mode"].startswith("I"):  # 16 bits, which Pillow would clip
                return file.read(index=0, rotate=True)[..., None].repeat(3, -1) // 257
            image = file.read(index=0, rotate=True, mode="RGBA")
        return image[..., :3] * (image[..., 3:] / 255)
    except Exception as error:  # whatever a foreign or damaged file provokes
        raise ValueError(f"{path} cannot be read ({error})") from error


def load_npy(path):
    """-> a memory-mapped array: nothing in the file is executed. Raises ValueError."""
    try:
        need(Path(path).is_file(), "there is no such file")  # or it is a pipe
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever a foreign or damaged file provokes
        raise ValueError(f"{path} is not a numeric .npy ({error})") from error


def read_video(path, height, width):
    """-> all coded frames, whatever their time stamps. Raises ValueError, OSError."""
    need(path.is_file(), f"{path}: there is no such file or folder, or it is a pipe")
    cover = (f"scale='max({width},ceil({height}*dar))':'max({height},ceil({width}/dar))':"  # dar:
             f"flags=area,format=rgb24,crop={width}:{height}")  # width / height as it is shown
    if path.suffix.lower() == ".gif":  # what is transparent becomes black; 8 bits would round
        cover = f"format=gbrap16,premultiply=inplace=1,{cover}"
    process, complaints = start_ffmpeg(
        "-xerror", *SAFE, "-i", f"file:{path}", "-vf", cover, "-fps_mode", "passthrough", "-bsf:v",
        "setts=ts=N", "-f", "rawvideo", "-", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    size = height * width * 3
    with process:  # when nobody wants more frames, its output is closed, and it ends
        for data in iter(lambda: process.stdout.read(size), b""):
            if len(data) == size:  # or it was killed
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    said = end_of(process, complaints, path).replace("moov atom not found", "not a whole video")
    said = said.replace("Format not on whitelist", "not in a format that is read:")
    need(not said, f"{path}: {said}")


def start_ffmpeg(*words, **pipes):
    """-> ffmpeg as a process, and the file of its complaints. Raises OSError if there is none."""
    complaints = tempfile.TemporaryFile()
    try:
        return subprocess.Popen([get_exe(), "-v", "error", *words], stderr=complaints,
                                start_new_session=True, **pipes), complaints  # Ctrl-C is not for it
    except (ImportError, RuntimeError) as error:
        raise OSError('there is no ffmpeg: pip install "imageio[ffmpeg]"') from error


def end_of(process, complaints, path):
    """Waits for ffmpeg -> its first complaint, or "". Raises OSError if it was killed."""
    code = process.wait()
    with complaints:
        complaints.seek(0)
        said = re.sub(r"\[.*? @ .*?\] ", "", complaints.read().decode(errors="replace")).strip()
    if code not in range(255) or (code and not said):
        raise OSError(5, "ffmpeg was killed", str(path))
    return said.partition("\n")[0]


def side_file(clip):
    """Where the actions of a clip are, if it has any: NAME.actions.npy beside NAME.mp4."""
    clip = Path(clip)
    return clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.actions.npy"


def read_actions(path, stride=1):
    """.npy (T, A) -> float32 (T, A): row t is the action that leads to frame t. Where only every
    stride-th frame is kept, it is the mean of the rows that lead there. Raises ValueError."""
    rows = load_npy(path)
    need(rows.ndim == 2 and rows.size and rows.dtype.kind in "biuf",
         f"{path}: {rows.dtype} {rows.shape}; numbers (T, A) are needed")
    rows = rows.astype(np.float64)
    wild = np.flatnonzero(~(abs(rows) < 2**24).all(0))  # float32 has no finer steps there than 1
    need(not len(wild), f"{path}: column {wild[:1]} has NaN or huge numbers: is it a time stamp?")
    means = [rows[max(0, t - stride + 1) : t + 1].mean(0) for t in range(len(rows))]
    return np.array(means, np.float32)


def to_frames(clip, device="cpu"):
    """uint8 (..., H, W, C) array -> float (..., C, H, W) tensor in [-1, 1]."""
    return torch.from_numpy(clip).to(device).movedim(-1, -3).float() / 127.5 - 1  # sent as bytes


def to_bytes(frames):
    """float (..., C, H, W) tensor in [-1, 1] -> uint8 (..., H, W, C) array: rounded, clamped."""
    x = ((frames.float() + 1) * 127.5).round().clamp(0, 255)
    return x.byte().movedim(-3, -1).cpu().numpy()


class Clips:
    """A folder of clips. Each is decoded once and memory-mapped: training waits for no decoder."""

    def __init__(self, folder, height, width, num_frames, stride=1, cache=None, quiet=False):
        """num_frames, stride: of a training clip. quiet: no progress bar. Raises ValueError if no
        clip can be used, OSError if the cache cannot be written."""
        need(Path(folder).is_dir(), f"--data {folder}: there is no such folder")
        cache = Path(os.path.expanduser(cache or "~/.cache/diffusion_forcing"))
        need(cache.parts[0] != "~", "there is no home folder: --cache is needed")
        self.stride, self.span = stride, (num_frames - 1) * stride + 1  # frames that a clip spans
        self.clips, hashes = [], []  # clips: path, length, actions (T, A) or None
        files, others = find_clips(folder, cache)
        for file in tqdm(files, f"decoding to {cache}", unit=" clips", disable=quiet):
            try:
                path, length = cached_clip(file, height, width, cache)
                need(length >= self.span, f"{file}: {length} frames; {self.span} are needed")
                side = side_file(file)
                rows = read_actions(side, stride) if os.path.lexists(side) else None
                need(rows is None or len(rows) >= length, f"{side}: {length} rows are needed")
            except (ValueError, FileNotFoundError) as error:  # a link that leads nowhere
                tqdm.write(f"skipped {file}: {str(error).removeprefix(f'{file}: ')}")
                continue
            self.clips.append((path, length, rows))
            name = os.fsencode(file.relative_to(folder).as_posix())
            hashes.append(int(hashlib.sha256(name).hexdigest(), 16) / 2**256)  # 0 to 1

        widths = {rows.shape[1] for *_, rows in self.clips if rows is not None}
        need(self.clips, f"--data {folder}: no usable video, .npy or image folder")
        need(len(widths) < 2, f"--data {folder}: actions of different widths, {sorted(widths)}")
        self.action_dim, hashes = max(widths, default=0), np.array(hashes)
        held = (len(hashes) >= 10) & ((hashes < 0.1) | (hashes == hashes.min()))  # whole clips
        starts = np.array([length - self.span + 1 for _, length, _ in self.clips])
        self.weight = {False: starts * ~held, True: starts * held}  # long clips come more often
        self.held_out = bool(held.any())
        print(f"{len(held)} clips, {held.sum()} of them held out; {len(files) - len(held)} skipped,"
              f" {others} other files")

    def batch(self, rng, n, num_frames, held=False):
        """-> clips (n, T, H, W, 3) uint8, actions (n, T, A) float32: row t leads to frame t. Where
        a clip has no side file, they are NaN, which means unknown."""
        clips, actions = [], np.full((n, num_frames, self.action_dim), np.nan, np.float32)
        share = self.weight[held] / self.weight[held].sum()
        for row, i in zip(actions, rng.choice(len(self.clips), n, p=share)):
            path, length, rows = self.clips[i]
            at = rng.integers(length - self.span + 1) + np.arange(num_frames) * self.stride
            at = np.minimum(at, length - 1)  # only previews are so long: then it stands still
            clips.append(np.lib.format.open_memmap(path, mode="r")[at])  # few may be open at once
            if rows is not None:
                row[:] = rows[at]
        return np.stack(clips), actions


def find_clips(folder, cache):
    """-> videos, .npy and folders of images at any depth, each once; the number of other files."""
    found, others, seen = {}, 0, {os.path.realpath(cache)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        names = sorted(name for name in names if name[0] != "." and not name.endswith(NO_CLIPS))
        videos = [name for name in names if name.lower().endswith(VIDEOS)]
        clips = videos + [name for name in names if name.lower().endswith(".npy")]
        others += len(names) - len(clips)
        images = len(list_images(Path(parent)))
        if images > 1 and not videos:  # beside videos, images are thumbnails
            clips.append(".")
            others -= images
        for name in clips:
            found.setdefault(os.path.realpath(Path(parent, name)), Path(parent, name))
    return sorted(found.values()), others


def cached_clip(file, height, width, cache):
    """-> path and length of a .npy, uint8 (T, H, W, 3), named by all that it was made from."""
    parts = list_images(file) if file.is_dir() else [file]
    made_from = [(os.path.abspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    name = hashlib.sha256(f"{VERSION} {made_from} {height} {width}".encode()).hexdigest()[:24]
    path = cache / f"{name}.npy"
    with contextlib.suppress(ValueError):  # it is not there yet, or damaged
        return path, len(load_npy(path))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (atomic_write(path) as temporary,
              video_writer(temporary, height, width, suffix=".npy") as write):
            for frame in read_frames(file, height, width):  # a long video does not fit in memory
                write(frame)
    except OSError as error:
        raise OSError(f"{file} cannot be decoded to --cache {cache}: {error}") from error
    return path, len(load_npy(path))


@contextlib.contextmanager
def video_writer(path, height, width, fps=15, suffix=None):
    """-> write(frame), which writes a uint8 (height, width, 3) frame to .mp4, .webm, .gif or .npy.
    Small pictures are enlarged to a height of 256 or more (not .npy). Raises OSError."""
    suffix = suffix or Path(path).suffix.lower()
    if suffix == ".npy":
        with open(path, "wb") as file:
            file.seek(128)  # the header comes last, when the number of frames is known
            try:
                yield lambda frame: file.write(frame.tobytes())
            finally:
                shape = ((file.tell() - 128) // (height * width * 3), height, width, 3)
                file.seek(0)
                np.lib.format.write_array_header_1_0(
                    file, dict(descr="|u1", fortran_order=False, shape=shape))
        return

    if suffix == ".gif" and fps > 50:
        tqdm.write(f"{path}: 50 frames/s, as no .gif can show more")
        fps = 50
    zoom, (last, options) = max(1, -(-256 // height)), CODECS[suffix]
    process, complaints = start_ffmpeg(
        "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(fps), "-s", f"{width}x{height}",
        "-i", "-", "-vf", f"scale=2*ceil(iw*{zoom}/2):2*ceil(ih*{zoom}/2):flags=neighbor,{last}",
        *options, f"file:{path}", stdin=subprocess.PIPE)
    try:
        yield lambda frame: process.stdin.write(frame.tobytes())
    except BrokenPipeError:  # it has ended before, and says why
        pass
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        said = end_of(process, complaints, path)
    if said:
        raise OSError(5, said, str(path))
