"""DICOM files become frames like any other: pixels only, every rule of frames holds, and nobody's name is repeated."""

import io
import logging
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from ccmdist.data.images import read_frame, read_mask
from ccmdist.errors import ShardError

NAME = "Zwetschgenmeier^Kunigunde"
SYNTAXES = {
    "implicit little": ImplicitVRLittleEndian,
    "explicit little": ExplicitVRLittleEndian,
    "explicit big": ExplicitVRBigEndian,
}


def frame(size=64, dtype=np.uint8, top=255):
    return np.random.default_rng(0).integers(0, top + 1, (size, size)).astype(dtype)


def dicom(pixels, syntax=ExplicitVRLittleEndian, **elements):
    """A file as an archive would hand it out, with a name in it."""
    about = FileMetaDataset()
    about.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    about.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    about.TransferSyntaxUID = syntax
    file = pydicom.Dataset()
    file.file_meta = about
    file.SOPClassUID, file.SOPInstanceUID = about.MediaStorageSOPClassUID, about.MediaStorageSOPInstanceUID
    file.PatientName, file.PatientID, file.PatientBirthDate = NAME, "H-4711-0815", "19331224"
    bits = 8 * pixels.dtype.itemsize
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = bits, bits, bits - 1, 0
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if syntax == JPEGBaseline8Bit:
        content = pydicom.encaps.encapsulate([content])
    file.add_new("PixelData", "OW" if bits == 16 else "OB", content + b"\0" * (len(content) % 2))
    for name, value in elements.items():
        setattr(file, name, value)
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_the_pixels_of_every_uncompressed_syntax_are_read(syntax, dtype, top):
    pixels = frame(dtype=dtype, top=top)
    found = read_frame(dicom(pixels, syntax), "here")
    expected = pixels if dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    assert (found.pixels == expected).all()
    assert found.is_scaled == (dtype == np.uint16)


def test_the_pixels_are_those_that_pydicom_decodes():
    for syntax in SYNTAXES.values():
        data = dicom(frame(size=33, dtype=np.uint16, top=65535), syntax)
        judged = pydicom.dcmread(io.BytesIO(data)).pixel_array
        assert (read_frame(data, "here").pixels == (judged.astype(np.uint32) + 128) // 257).all()


def test_twelve_bits_reach_white_and_monochrome1_is_inverted():
    pixels = frame(dtype=np.uint16, top=4095)
    pixels[0, 0], pixels[0, 1] = 4095, 0
    found = read_frame(dicom(pixels, BitsStored=12, HighBit=11), "here").pixels
    assert found[0, 0] == 255
    assert (np.abs(found.astype(int) - pixels / 4095 * 255) < 1.1).all()
    inverted = read_frame(dicom(pixels, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1"), "here")
    assert inverted.pixels[0, 1] == 255
    assert inverted.pixels[0, 0] == 0


def test_the_footer_of_a_native_export_is_cropped_even_if_it_is_burnt_in():
    pixels = np.random.default_rng(0).integers(0, 255, (484, 384)).astype(np.uint8)
    found = read_frame(dicom(pixels, BurnedInAnnotation="YES"), "here")
    assert found.is_cropped
    assert (found.pixels == pixels[:384]).all()


def test_a_mask_may_be_dicom_too():
    nerves = np.zeros((64, 64), np.uint8)
    nerves[10] = 255
    assert (read_mask(dicom(nerves), "here").pixels == (nerves > 0)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dicom(frame(), JPEGBaseline8Bit), "here is a compressed DICOM file; uncompress it, as `gdcmconv --raw` does"),
        (dicom(frame(), DeflatedExplicitVRLittleEndian), "here is a compressed DICOM file"),
        (dicom(frame(), NumberOfFrames=3), "here holds 3 pictures, expected one"),
        (dicom(frame(), PhotometricInterpretation="RGB"), "here has colours, expected grey"),
        (dicom(frame(), SamplesPerPixel=3), "here has colours"),
        (dicom(frame(), PixelRepresentation=1), "here stores 8 of 8 bits, or numbers with a sign"),
        (dicom(frame(), BitsAllocated=32), "here stores 8 of 32 bits"),
        (dicom(frame(), HighBit=5), "here stores 8 of 8 bits"),
        (dicom(frame(), BitsStored=4, HighBit=3), "here holds values of more than the 4 bits"),
        (dicom(frame(), Rows=65), "here does not hold the 64x65 px that it says"),
        (dicom(frame(), Rows=60000, Columns=60000), "here has 60000x60000 px, expected at most"),
        (dicom(frame(), BurnedInAnnotation="YES"), "here says that text is burnt into it .*blank the text"),
        (dicom(frame())[:400], "here"),
        (bytes(128) + b"DICM" + b"nonsense" * 20, "here"),
    ],
)
def test_what_is_refused_is_named_without_what_the_file_says_of_a_person(data, message, caplog, capfd):
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(), pytest.raises(ShardError, match=message) as caught:
        warnings.simplefilter("error")
        read_frame(data, "here")
    told = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert not any(part in told for part in ("Zwetschgen", "4711", "1933"))


def test_a_value_that_no_element_may_have_is_neither_told_nor_in_the_way(caplog, capfd):
    # pydicom warns of such values and quotes them.
    data = dicom(frame()).replace(b"19331224", b"Kunigund")
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_frame(data, "here").pixels == frame()).all()
    assert "Kunigund" not in caplog.text + "".join(capfd.readouterr())
