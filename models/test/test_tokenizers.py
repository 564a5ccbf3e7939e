"""Action tokenisers: what they give back, what they refuse, and answers that are always chunks."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import dct
from vla_models.tokenizer import TokenizerError
from vla_models.tokenizers import (
    BinTokenizer,
    FastAnswer,
    FastTokenizer,
    OpenVLATokenizer,
    PhraseAnswer,
    WordAnswer,
    decode_answer,
    pick,
)

SHAPE = (8, 3)
CHUNKS = arrays(np.float64, SHAPE, elements=st.floats(-1, 1, width=32))
TOKENS = st.lists(st.integers(0, 299), max_size=40)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    rng = np.random.default_rng(0)
    walks = np.cumsum(rng.normal(0, 0.15, (300, *SHAPE)), 1).clip(-1, 1)
    corners = np.ones((2, *SHAPE)) * np.array([-1.0, 1.0])[:, None, None]
    return FastTokenizer.fit(np.concatenate([walks, corners]), vocabulary=300)


# ------------------------------------------------------------------------------------------------------- bins


@given(CHUNKS)
def test_bins_are_half_a_bin_off_at_most_and_rt1s_one(chunk):
    for rounding, off in (("centre", 0.5 * 2 / 256), ("truncate", 2 / 255)):
        tokenizer = BinTokenizer(rounding=rounding)
        back = tokenizer.decode(tokenizer.encode(chunk))
        assert np.abs(back - chunk).max() <= off + 1e-12
        if rounding == "truncate":
            assert (back <= chunk + 1e-12).all()


def test_rt1s_formula():
    """google-research/robotics_transformer: world vector +-2, rotation +-pi/2; truncated, not rounded."""
    world = BinTokenizer(-2.0, 2.0, 256, "truncate")
    tokens = world.encode([-2.5, -2.0, 0.0, 0.01, 1.99, 2.0, 9.0])
    np.testing.assert_array_equal(tokens, [0, 0, 127, 128, 254, 255, 255])
    np.testing.assert_allclose(world.decode([0, 127, 255]), [-2.0, 127 / 255 * 4 - 2, 2.0])
    each = BinTokenizer([-2.0, -np.pi / 2], [2.0, np.pi / 2], 256, "truncate")
    np.testing.assert_array_equal(each.encode([[2.0, 2.0], [0.0, 0.0]]), [[255, 255], [127, 127]])


def test_openvlas_formula():
    """prismatic/vla/action_tokenizer.py: digitize gives 1 to 256; the last two tokens mean the same centre."""
    tokenizer = OpenVLATokenizer()
    edges = np.linspace(-1, 1, 256)
    np.testing.assert_array_equal(tokenizer.encode([-1.0, -1.5, 1.0, 0.999, 0.0]), [31999, 31999, 31744, 31745, 31872])
    np.testing.assert_allclose(tokenizer.decode([31999, 31998]), [(edges[0] + edges[1]) / 2, (edges[1] + edges[2]) / 2])
    assert tokenizer.decode([31744])[0] == tokenizer.decode([31745])[0] == (edges[-1] + edges[-2]) / 2


@given(CHUNKS)
def test_openvlas_bins_are_half_a_bin_off_at_most(chunk):
    tokenizer = OpenVLATokenizer()
    assert np.abs(tokenizer.decode(tokenizer.encode(chunk)) - chunk).max() <= 1 / 255 + 1e-12


@pytest.mark.parametrize("tokenizer", [BinTokenizer(), OpenVLATokenizer()])
def test_what_is_no_action_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="finite"):
        tokenizer.encode([[np.nan]])
    with pytest.raises(TokenizerError, match="whole numbers from"):
        tokenizer.decode([32000])
    with pytest.raises(TokenizerError, match="whole numbers from"):
        tokenizer.decode([0.5])


@pytest.mark.parametrize("wrong", [{"low": 1.0}, {"bins": 1}, {"rounding": "up"}, {"high": np.inf}])
def test_bins_that_cannot_be_are_refused(wrong):
    with pytest.raises(TokenizerError):
        BinTokenizer(**wrong)


# ------------------------------------------------------------------------------------------------------- FAST


@given(CHUNKS)
@settings(deadline=None)
def test_fast_is_half_a_step_off_at_most(fast, chunk):
    """Rounding moves each coefficient by half a step, 0.5/scale; the transform keeps lengths."""
    for tokenizer in (fast, FastTokenizer.unfitted(SHAPE)):
        back = tokenizer.decode(tokenizer.encode(chunk))
        if dct(chunk, axis=0, norm="ortho").min() * 10 >= tokenizer.min_token:
            assert np.abs(dct(back - chunk, axis=0, norm="ortho")).max() <= 0.05 + 1e-9


def test_fast_reads_the_lowest_frequencies_of_all_numbers_first():
    tokenizer = FastTokenizer.unfitted((4, 2))
    chunk = np.array([[0.1, 0.2]] * 4)  # constant: only the first coefficient of each number, 0.1*sqrt(4)*10 = 2
    spelled = [tokenizer.spellings[token] for token in tokenizer.encode(chunk)]
    assert [piece[0] - 64 for piece in spelled] == [2, 4, 0, 0, 0, 0, 0, 0]


def test_fast_compresses_what_it_was_fitted_to(fast):
    chunk = np.cumsum(np.random.default_rng(9).normal(0, 0.15, SHAPE), 0).clip(-1, 1)
    assert len(fast.encode(chunk)) < 0.8 * chunk.size


def test_fast_takes_what_lies_under_its_smallest_coefficient_for_that(fast):
    deep = np.full(SHAPE, -3.0)
    assert (dct(fast.decode(fast.encode(deep)), axis=0, norm="ortho") * fast.scale).min() == pytest.approx(
        fast.min_token
    )


@given(TOKENS)
@settings(deadline=None)
def test_fast_decodes_to_exactly_a_chunk_or_says_why_not(fast, tokens):
    try:
        chunk = fast.decode(tokens)
    except TokenizerError as error:
        assert "FAST" in str(error) or "whole numbers" in str(error)
    else:
        assert chunk.shape == SHAPE and fast.decode(fast.encode(chunk)) == pytest.approx(chunk)


def test_fast_reports_each_kind_of_broken_answer(fast):
    tokens = fast.encode(np.zeros(SHAPE))
    with pytest.raises(TokenizerError, match="expected the 8 x 3 = 24 coefficients .* found"):
        fast.decode(tokens[:-1])
    with pytest.raises(TokenizerError, match="found"):
        fast.decode([*tokens, tokens[0]])
    with pytest.raises(TokenizerError, match="whole numbers from 0 to"):
        fast.decode([fast.vocabulary])
    half = next(i for i, spelling in enumerate(fast.spellings) if spelling == b"\xc3")  # half of a character
    with pytest.raises(TokenizerError, match="do not decode"):
        fast.decode([half] * 24)
    with pytest.raises(TokenizerError, match="expected \\(8, 3\\), found \\(3, 8\\)"):
        fast.encode(np.zeros(SHAPE[::-1]))
    with pytest.raises(TokenizerError, match="finite"):
        fast.encode(np.full(SHAPE, np.inf))


def test_fast_survives_a_file(fast, tmp_path):
    fast.save(tmp_path / "fast.json")
    again = FastTokenizer.load(tmp_path / "fast.json")
    chunk = np.random.default_rng(0).uniform(-1, 1, SHAPE)
    np.testing.assert_array_equal(again.encode(chunk), fast.encode(chunk))
    assert (again.scale, again.min_token, again.shape) == (fast.scale, fast.min_token, fast.shape)
    values = json.loads((tmp_path / "fast.json").read_text())
    for wrong in ({**values, "format": "other"}, {**values, "bpe": {}}, {**values, "scale": -1}, {**values, "more": 1}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(TokenizerError, match="FAST"):
            FastTokenizer.load(tmp_path / "wrong.json")
    for text in ("{", "[]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(TokenizerError, match="FAST"):
            FastTokenizer.load(tmp_path / "wrong.json")
    with pytest.raises(TokenizerError, match="not readable"):
        FastTokenizer.load(tmp_path / "nothing.json")


def test_a_fit_is_a_function_of_the_chunks():
    chunks = np.cumsum(np.random.default_rng(0).normal(0, 0.2, (50, *SHAPE)), 1)
    one, two = (FastTokenizer.fit(chunks, vocabulary=400).to_dict() for _ in range(2))
    assert one == two
    with pytest.raises(TokenizerError, match="257 or more"):
        FastTokenizer.fit(chunks, vocabulary=64)
    with pytest.raises(TokenizerError, match="\\(N, T, D\\)"):
        FastTokenizer.fit(chunks[0])


# ------------------------------------------------------------------------------------------------------- answers

INTEGERS = [tuple(ord(c) for c in f"{i} ") for i in range(256)]
SINGLE = [(511 - i,) for i in range(256)]


def answer_of(kind: str, fast: FastTokenizer):
    if kind == "fast":
        return FastAnswer(fast, SHAPE, 1000, 16, (5, 6), (9, 1), 80)
    words = INTEGERS if kind == "integers" else SINGLE
    return WordAnswer(BinTokenizer(), words, SHAPE, 512, lead=(0, 1))


@pytest.mark.parametrize("kind", ["integers", "overwritten", "fast"])
@given(chunk=CHUNKS, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_a_chunk_is_an_answer_and_any_allowed_answer_is_a_chunk(fast, kind, chunk, seed):
    answer = answer_of(kind, fast)
    tokens = answer.encode(chunk)
    assert len(tokens) <= answer.length
    np.testing.assert_allclose(answer.encode(answer.decode(tokens)), tokens)
    # Each token of it is allowed where it stands.
    rest = tokens if kind != "fast" else tokens[:-1]  # decoding ends with the first token of the end
    for i, token in enumerate(rest.tolist()):
        assert answer.allowed(rest[:i].tolist())[token]
    assert answer.allowed(rest.tolist()) is None
    # Whatever a network wants to say, what it may say is a chunk.
    rng = np.random.default_rng(seed)
    said = decode_answer(answer, rng.normal(size=answer.vocabulary), lambda *_: rng.normal(size=answer.vocabulary),
                         rng.normal(size=answer.length), 1.0)  # fmt: skip
    assert answer.decode(said).shape == SHAPE


def test_tokens_of_padded_steps_do_not_count():
    answer = WordAnswer(BinTokenizer(), INTEGERS, (2, 1), 512, lead=(0, 1))
    tokens = answer.encode(np.array([[-1.0], [1.0]]), 1)
    assert "".join(map(chr, tokens)) == "1 0 255 " and answer.leading(tokens) == 1
    np.testing.assert_array_equal(answer.inside(tokens, np.array([False, True])), [1, 1, 1, 1, 0, 0, 0, 0])


def test_words_that_cannot_be_told_apart_are_refused():
    with pytest.raises(TokenizerError, match="begins another"):
        PhraseAnswer([[(1,), (1, 2)]], 8)
    with pytest.raises(TokenizerError, match="from 0 to 7"):
        PhraseAnswer([[(8,)]], 8)
    with pytest.raises(TokenizerError, match="256 words"):
        WordAnswer(BinTokenizer(), SINGLE[:3], SHAPE, 512)


def test_broken_answers_are_reported(fast):
    answer = answer_of("fast", fast)
    tokens = answer.encode(np.zeros(SHAPE)).tolist()
    for wrong, said in ((tokens[1:], "begins with"), (tokens[:-2], "end 9"), (tokens[:2] + [9], "found 0")):
        with pytest.raises(TokenizerError, match=said):
            answer.decode(wrong)
    with pytest.raises(TokenizerError, match="expected 25 words, found 24"):
        answer_of("overwritten", fast).decode([511] + [500] * 23)
    free = FastAnswer(fast, SHAPE, 1000, 16, (5, 6), (9, 1), 80, free=True)
    always = np.eye(1000)[700]
    with pytest.raises(TokenizerError, match="its end within 80 tokens"):
        decode_answer(free, always, lambda *_: always, np.zeros(80), 0.0)
    with pytest.raises(TokenizerError, match="not finite"):
        decode_answer(free, np.full(1000, np.nan), lambda *_: always, np.zeros(80), 0.0)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log([0.1, 0.6, 0.3, 1e-30])
    drawn = [pick(logits, noise, 1.0) for noise in np.random.default_rng(0).normal(size=4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.1, 0.6, 0.3, 0.0], atol=0.03)
    assert pick(logits, 3.0, 0.0) == 1
    # Half the temperature squares the chances; the noise has that deviation.
    drawn = [pick(logits, 0.5 * noise, 0.5) for noise in np.random.default_rng(0).normal(size=4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, np.array([1, 36, 9, 0]) / 46, atol=0.03)
    masked = np.where([True, False, True, False], logits, -np.inf)
    assert {pick(masked, noise, 1.0) for noise in (-9.0, 0.0, 9.0)} <= {0, 2}
