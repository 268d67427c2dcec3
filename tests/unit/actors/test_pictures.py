"""Sample grids and their captions."""

from __future__ import annotations

import numpy as np

from actors.pictures import CAPTION_LINES, LINE, caption, contact_sheet, wrapped


def test_a_contact_sheet_shows_every_picture_unchanged() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet(pictures, list("abcde"), columns=2, width=13))
    assert sheet.shape == (3 * (8 + 18), 2 * (12 + 8), 3)
    for i, picture in enumerate(pictures):
        y, x = i // 2 * 26 + 2, i % 2 * 20 + 4
        np.testing.assert_array_equal(sheet[y : y + 8, x : x + 12], picture.repeat(2, 0).repeat(2, 1))
        below = sheet[y + 9 : y + 23, x : x + 12]
        assert below.min() < 128, "no caption"
    assert (sheet[52:, 20:] == 255).all()  # the empty sixth place


def test_captions_are_the_quoted_text() -> None:
    assert caption('a sign that says "407"') == "407"
    assert caption("a red panda that holds a very long banner") == "a red panda that holds a very long banner"
    assert caption('an inch is 1" long') == 'an inch is 1" long'


def test_pictures_of_unequal_sizes_keep_their_proportions() -> None:
    pictures = [np.full((4, 6, 3), 10, np.uint8), np.full((2, 2, 3), 20, np.uint8)]
    sheet = np.asarray(contact_sheet(pictures, ["", ""], columns=2, width=12))
    assert sheet.shape == (8 + 18, 2 * (12 + 8), 3)
    assert (sheet == 10).all(-1).sum() == 8 * 12
    assert (sheet[4:8, 24 + 4 : 24 + 8] == 20).all()  # twice as large, in the middle of its cell
    assert (sheet == 20).all(-1).sum() == 4 * 4


def test_long_captions_are_wrapped_and_none_is_cut_off() -> None:
    text = "a red panda that holds a very long banner"
    assert wrapped(text, 12, len) == ["a red panda", "that holds a", "very long b…"]
    assert wrapped(text, 100, len) == [text]
    assert wrapped("incomprehensibilities", 8, len) == ["incompr…"]
    assert wrapped("", 8, len) == []
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    sheet = np.asarray(contact_sheet(pictures, [text * 5, "x"], columns=1, width=64))
    assert sheet.shape == (2 * (64 + 6 + CAPTION_LINES * LINE), 64 + 8, 3)
    assert (sheet[66:, [0, -1]] == 255).all(), "the caption runs into the edge"


def test_the_last_line_of_a_caption_is_whole_below_short_strips() -> None:
    """Its ink, descenders among it, is that of the same words with room below."""
    words = ["gypsy, jog (by) day", "fog jumping by " * 6]
    strips = [np.full((16, 192, 3), 255, np.uint8)] * 2
    sheet = np.asarray(contact_sheet(strips, words, columns=2))
    roomy = np.asarray(contact_sheet([*strips, strips[0]], [*words, ""], columns=2))
    assert sheet.min() < 128
    assert (roomy < 255).sum() == (sheet < 255).sum()
