"""Types get keys by registered functions; the most specific class wins, and its code is part of the key."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modcache import (
    CacheWarning,
    KeyExtractionError,
    UsageTypeError,
    cache_of,
    cached_module,
    keys,
    register_key_extractor,
)
from modcache.batch import split
from modcache.keys import Extractor, registry
from modcache.keys.registry import encode_registered, has_extractor, is_row
from modcache.tensors import NoContentError


@pytest.fixture(autouse=True)
def _only_here(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_by_type", dict(registry._by_type))
    monkeypatch.setattr(registry, "_resolved", {})


class Clip:
    def __init__(self, samples, rate=8000):
        self.samples, self.rate = samples, rate


class StereoClip(Clip):
    pass


@dataclasses.dataclass
class Recording:
    name: str
    second: int
    noise: object = None


def key_of(value):
    return encode_registered(value)


def test_a_registered_type_has_keys():
    """Objects of a registered type are told apart by what the function says, and by nothing else."""
    assert key_of(Clip(b"a")) is None
    assert not is_row(Clip(b"a"))

    @register_key_extractor(Clip)
    def clip_key(clip):
        return clip.samples, clip.rate

    assert clip_key(Clip(b"a", 1)) == (b"a", 1)
    assert is_row(Clip(b"a"))
    assert has_extractor(StereoClip)
    assert key_of(Clip(b"a")) == key_of(Clip(b"a"))
    assert len({key_of(Clip(b"a")), key_of(Clip(b"b")), key_of(Clip(b"a", 1)), key_of(StereoClip(b"a"))}) == 4


def test_the_most_specific_class_wins():
    """A function for a subclass is asked before one for its base, in whatever order they were registered."""
    register_key_extractor(StereoClip)(lambda clip: "stereo")
    register_key_extractor(Clip)(lambda clip: "mono")
    assert key_of(StereoClip(b"a")) == key_of(StereoClip(b"b"))
    assert b"stereo" in key_of(StereoClip(b"a"))
    assert b"mono" in key_of(Clip(b"a"))


def test_an_edited_function_never_meets_the_keys_of_the_old_one():
    """The code of the function is part of the key."""
    register_key_extractor(Clip)(lambda clip: clip.samples)
    before = key_of(Clip(b"a"))
    register_key_extractor(Clip)(lambda clip: clip.samples[:1])
    assert key_of(Clip(b"a")) != before


def test_registering_what_is_no_class():
    """A type is asked for, as is a key of the accepted kinds."""
    with pytest.raises(UsageTypeError, match=r"register_key_extractor\(...\) takes a class; found 3"):
        register_key_extractor(3)
    with pytest.raises(UsageTypeError, match=r"Clip\) decorates a function of one object; found 3"):
        register_key_extractor(Clip)(3)
    register_key_extractor(Clip)(lambda clip: [clip.samples])
    with pytest.raises(KeyExtractionError, match=r"the key function for .*Clip returned a builtins\.list"):
        key_of(Clip(b"a"))


class Lengths(nn.Module):
    """One number for each of whatever it gets; counts its rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, rows):
        return torch.tensor([[float(np.asarray(getattr(row, "second", row)).sum())] for row in rows]) * self.weight


def computed(values, *batches):
    module = cached_module(Lengths(), freeze=True)
    for batch in (values, *batches):
        module(batch)
    return cache_of(module).stats.computed


def test_rows_of_a_dataclass():
    """A registered dataclass is a row, not a structure around rows."""
    register_key_extractor(Recording)(lambda recording: (recording.name, recording.second))
    rows = [Recording("wren", 1, object()), Recording("wren", 2, object()), Recording("wren", 1, object())]
    assert computed(rows, rows[::-1]) == 2


def test_rows_of_tensors_of_a_registered_subclass():
    """A tensor or array subclass has rows once it is registered."""

    class Marked(torch.Tensor):
        pass

    class Measured(np.ndarray):
        pass

    def keys_of(value):
        bound = [("x", value), ("y", [0] * len(value))]
        return Extractor()(bound, split(bound, frozenset(), is_row)).keys

    marked, measured = torch.tensor([1.0, 2.0, 1.0]).as_subclass(Marked), np.array([[1], [2], [1]]).view(Measured)
    for value in (marked, measured):
        with pytest.raises(NoContentError):
            keys_of(value)
    register_key_extractor(Marked)(float)
    register_key_extractor(Measured)(lambda row: int(row[0]))
    for value in (marked, measured):
        first, second, third = keys_of(value)
        assert first == third != second


def test_arrays_and_audio_need_no_registration():
    """numpy arrays are keyed by their values, alone and in lists."""
    audio = [np.arange(4, dtype=np.float32), np.arange(5, dtype=np.float32), np.arange(4, dtype=np.float32)]
    assert computed(audio, audio) == 2


def image(mode="RGB", colour=0, size=(2, 2)):
    return Image.new(mode, size, colour)


def with_info(**info):
    made = image()
    made.info.update(info)
    return made


def with_orientation(number):
    made = image()
    made.getexif()[274] = number
    return made


def with_palette(colours, mode="RGB"):
    made = Image.new("P", (2, 2))
    made.putpalette(colours, mode)
    return made


IMAGES = {
    "black": image,
    "white": lambda: image(colour=(255, 255, 255)),
    "wide": lambda: image(size=(4, 1)),
    "tall": lambda: image(size=(1, 4)),
    "grey": lambda: image("L"),
    "with alpha": lambda: image("RGBA"),
    "palette": lambda: with_palette([1, 2, 3] * 4),
    "other palette": lambda: with_palette([3, 2, 1] * 4),
    "palette with alpha": lambda: with_palette([1, 2, 3, 9] * 4, "RGBA"),
    "palette with other alpha": lambda: with_palette([1, 2, 3, 7] * 4, "RGBA"),
    "transparency": lambda: with_info(transparency=0),
    "profile": lambda: with_info(icc_profile=b"x"),
    "turned": lambda: with_orientation(6),
}


def test_images_are_registered_without_being_imported():
    """Everything that decoding may depend on makes another key: pixels, mode, palette, transparency, orientation."""
    found = {name: key_of(make()) for name, make in IMAGES.items()}
    assert all(is_row(make()) for make in IMAGES.values())
    assert len(set(found.values())) == len(IMAGES)
    assert found == {name: key_of(make()) for name, make in IMAGES.items()}


def test_images_that_cannot_be_read(tmp_path):
    """A broken image has no content; a module that does not read its pixels runs, uncached."""
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])

    class Widths(nn.Module):
        def forward(self, images):
            return torch.tensor([[float(image.width)] for image in images])

    module = cached_module(Widths(), freeze=True)
    with Image.open(path) as cut, pytest.warns(CacheWarning, match=r"an image that cannot be read \(.*truncated.*\)"):
        assert torch.equal(module([image(), cut]), torch.tensor([[2.0], [64.0]]))
    assert cache_of(module).stats.reasons == {"no key": 2}


def test_rows_of_images():
    """A list of images, of any sizes, is rows; one image is one row."""
    images = [image(), image(size=(4, 4)), image()]
    assert computed(images, images) == 2
    assert split([("x", image())], frozenset(), is_row).columns[0].single


def test_custom_functions_see_registered_objects():
    """A key function is asked before the registry."""
    register_key_extractor(Clip)(lambda clip: clip.samples)
    bound = [("x", [Clip(b"a"), Clip(b"b")])]
    batch = split(bound, frozenset(), is_row)
    assert len(set(keys.custom(lambda clip: clip.rate)(bound, batch).keys)) == 1


@pytest.mark.parametrize("cls", [str, int, bytes, float, bool, type(None), complex, torch.Tensor, nn.Parameter])
def test_types_that_are_always_keyed_by_value(cls):
    """A function for a type whose keys never ask for one is refused, with what to do instead."""
    with pytest.raises(UsageTypeError, match=f"{cls.__name__} is always keyed by value. .* key= to cached_module"):
        register_key_extractor(cls)


def test_a_registered_function_that_raises():
    """An error of a registered function is a KeyExtractionError from it, as it is for `custom`."""
    register_key_extractor(Clip)(lambda clip: clip.nothing)
    module = cached_module(Lengths(), freeze=True)
    with pytest.raises(KeyExtractionError, match=r"the key function for .*Clip raised AttributeError: ") as found:
        module([Clip(b"a"), Clip(b"b")])
    assert isinstance(found.value.__cause__, AttributeError)


def test_registering_while_another_thread_looks_up(monkeypatch):
    """What a thread found before a registration is not remembered after it."""
    threads = []

    class Slow(dict):
        def get(self, cls):
            found = super().get(cls)
            if cls is Clip and not threads:
                threads.append(threading.Thread(target=register_key_extractor(Clip), args=(lambda clip: "late",)))
                threads[0].start()
                threads[0].join(0.2)
            return found

    monkeypatch.setattr(registry, "_by_type", Slow())
    assert not has_extractor(Clip)
    threads[0].join()
    assert has_extractor(Clip)
