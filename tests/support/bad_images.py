"""More than 120 uploads as careless and hostile callers send them, each with the status and the code it must get."""

import random
import struct
import zlib

from odd_images import broken_files, fine_files, picture, png, save
from PIL import Image

OK = (200, None)
DAMAGED = (422, "image_damaged")
FORMAT = (415, "unsupported_image_format")
LARGE = (422, "image_too_large")
ANIMATED = (422, "animated_not_supported")
EMPTY = (422, "image_empty")

Case = tuple[bytes, tuple[int, str | None]]


def bad_images() -> dict[str, Case]:
    """name -> (upload, (status, code))."""
    rgb, large = picture(), Image.effect_noise((128, 128), 80).convert("RGB")  # noise: every part of the file says something
    cases: dict[str, Case] = {}
    cases |= {f"fine/{name}": (data, _outcome_of_fine(name, data)) for name, data in fine_files(rgb).items()}
    cases |= {f"broken/{name}": (data, _outcome_of_broken(name, reason)) for name, (data, reason) in broken_files(rgb).items()}
    for format, options in {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.items():
        whole = save(large, format, **options)
        for percent in range(5, 100, 5):
            cases[f"cut at {percent} %.{format.lower()}"] = (whole[: len(whole) * percent // 100], DAMAGED)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"orientation {orientation}.jpg"] = (save(rgb, "JPEG", exif=exif), OK)
    cases |= wrong_inside(large)
    cases |= bombs()
    cases |= two_in_one(rgb)
    cases |= much_beside_the_pixels(rgb)
    return cases


def wrong_inside(large: Image.Image) -> dict[str, Case]:
    """Files whose outside is right."""
    whole = save(large, "PNG")
    sums = bytearray(whole)
    sums[-14] ^= 0xFF  # in the checksum of the last IDAT
    header = bytearray(whole)
    header[29] ^= 0xFF  # in that of IHDR
    random_file = random.Random(1).randbytes
    cases: dict[str, Case] = {
        "wrong checksum of the pixels.png": (bytes(sums), OK),  # zlib's own is right, and Pillow asks that one
        "wrong checksum of the header.png": (bytes(header), DAMAGED),
        "impossible bit depth.png": (png(8, 8, 3, 2, b"\0" * 100), DAMAGED),
        "impossible colour type.png": (png(8, 8, 8, 5, b"\0" * 100), DAMAGED),
        "no pixels.png": (_png_without_pixels(), DAMAGED),
        "too few rows.png": (png(64, 64, 8, 2, b"\0" * 193 * 3), OK),  # to Pillow the others are black
        "no height.png": (png(10, 0, 8, 2, b"\0"), DAMAGED),
        "riff without webp": (b"RIFF" + struct.pack("<I", 100) + b"WAVE" + bytes(100), FORMAT),
        "webp without a frame.webp": (b"RIFF" + struct.pack("<I", 12) + b"WEBPVP8 " + bytes(4), DAMAGED),
        "webp of noise.webp": (b"RIFF" + struct.pack("<I", 1000) + b"WEBPVP8L" + random_file(1000), DAMAGED),
        "jpeg of noise.jpg": (b"\xff\xd8\xff\xe0" + random_file(4000), DAMAGED),
        "png of noise.png": (b"\x89PNG\r\n\x1a\n" + random_file(4000), DAMAGED),
        "jpeg without a frame.jpg": (b"\xff\xd8\xff\xd9", DAMAGED),
        "one byte": (b"\x89", FORMAT),
        "fits.fits": (b"SIMPLE  =                    T".ljust(2880), FORMAT),
        "xbm.xbm": (b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0xff};\n", FORMAT),
        "windows metafile.wmf": (b"\xd7\xcd\xc6\x9a" + bytes(60), FORMAT),
        "json.json": (b'{"image": "aGVsbG8="}', FORMAT),
        "base64.txt": (b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwC", FORMAT),
        "pickle.pkl": (b"\x80\x04\x95\x10\x00\x00\x00", FORMAT),
        "elf": (b"\x7fELF\x02\x01\x01" + bytes(100), FORMAT),
        "nothing but zeros": (bytes(1_000_000), FORMAT),
    }
    return cases


def bombs() -> dict[str, Case]:
    """Small files with many pixels."""
    side = 4001
    return {
        "16.008 million pixels.png": (png(side, side, 1, 0, bytes((side // 8 + 2) * side)), LARGE),
        "144 million pixels.png": (png(12_000, 12_000, 1, 0, bytes(1501 * 12_000)), LARGE),
        "wide.png": (png(65_535, 1, 8, 0, bytes(65_536)), LARGE),
        "tall.png": (png(1, 65_535, 8, 0, bytes(2 * 65_535)), LARGE),
        "just too wide.png": (png(16_385, 1, 8, 0, bytes(16_386)), LARGE),
        "as wide as may be.png": (png(16_384, 1, 8, 0, bytes(16_385)), OK),
        "2 ** 31 pixels a side.png": (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"), LARGE),
        "large.webp": (save(Image.new("L", (16_000, 1001)), "WEBP", lossless=True), LARGE),
        "large.jpg": (save(Image.new("L", (16_000, 1001)), "JPEG"), LARGE),
        "text bomb.png": (_with_chunk(save(picture(), "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1)), DAMAGED),
    }


def two_in_one(rgb: Image.Image) -> dict[str, Case]:
    """Files that are an image and something else: the image counts, the rest is never looked at."""
    html = b"<script>alert(1)</script>"
    return {
        "png and zip.png": (save(rgb, "PNG") + b"PK\x03\x04" + bytes(100), OK),
        "jpeg and html.jpg": (save(rgb, "JPEG") + html, OK),
        "html in a comment.jpg": (save(rgb, "JPEG", comment=html), OK),
        "html before a jpeg": (html + save(rgb, "JPEG"), FORMAT),
        "png before a jpeg.png": (save(rgb, "PNG") + save(rgb, "JPEG"), OK),
        "pictures of a telephone.mpo": (save(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]), OK),
        "one frame.png": (save(rgb, "PNG", save_all=True, append_images=[]), OK),
        "one frame.webp": (save(rgb, "WEBP", save_all=True, append_images=[]), OK),
    }


def much_beside_the_pixels(rgb: Image.Image) -> dict[str, Case]:
    """Metadata that is large or odd: dropped with all other metadata."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return {
        "large exif.jpg": (save(rgb, "JPEG", exif=exif), OK),
        "large xmp.jpg": (save(rgb, "JPEG", xmp=b"x" * 60_000), OK),
        "large xmp.webp": (save(rgb, "WEBP", xmp=b"x" * 1_000_000), OK),
        "many text chunks.png": (_with_chunk(save(rgb, "PNG"), b"tEXt", b"key\0value", times=2000), OK),
        "unknown chunk.png": (_with_chunk(save(rgb, "PNG"), b"abCd", bytes(100_000)), OK),
        "large profile.jpg": (save(rgb, "JPEG", icc_profile=bytes(200_000)), OK),
    }


def _outcome_of_fine(name: str, data: bytes) -> tuple[int, str | None]:
    if name in ("animated.webp", "animated.png"):
        return ANIMATED
    return OK if data.startswith((b"\x89PNG", b"\xff\xd8\xff")) or data[8:12] == b"WEBP" else FORMAT


def _outcome_of_broken(name: str, reason: str) -> tuple[int, str | None]:
    if reason == "empty":
        return EMPTY
    if "pixels" in reason and not name.endswith(".tif"):
        return LARGE
    return DAMAGED if reason == "damaged" and name.endswith((".png", ".jpg", ".webp")) else FORMAT


def _png_without_pixels() -> bytes:
    whole = png(8, 8, 8, 2, b"")
    return whole[:33] + whole[-12:]


def _with_chunk(whole: bytes, kind: bytes, body: bytes, *, times: int = 1) -> bytes:
    """A PNG with a chunk more, after its header."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return whole[:33] + times * chunk + whole[33:]
