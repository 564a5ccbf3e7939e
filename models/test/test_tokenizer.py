"""Instructions as word indices."""

import pytest
from vla_models.tokenizer import Tokenizer, TokenizerError

VOCABULARY = Tokenizer.build(["Pick up the red cube", "pick up the BLUE ball."])


def test_vocabulary_is_lower_case_sorted_and_starts_with_the_padding():
    assert VOCABULARY == ("", "ball", "blue", "cube", "pick", "red", "the", "up")


def test_words_become_indices_padded_to_the_context():
    assert Tokenizer(VOCABULARY, 6).encode("Pick, the red cube!").tolist() == [4, 6, 5, 3, 0, 0]


def test_unknown_words_are_dropped():
    assert Tokenizer(VOCABULARY, 3).encode("please pick red").tolist() == [4, 5, 0]


@pytest.mark.parametrize("text", ["", "   ", "hello there"])
def test_an_instruction_with_no_known_word_is_an_error(text):
    with pytest.raises(TokenizerError, match="no word of it is known"):
        Tokenizer(VOCABULARY, 6).encode(text)


def test_an_instruction_longer_than_the_context_is_an_error():
    with pytest.raises(TokenizerError, match="at most 2 words, found 3"):
        Tokenizer(VOCABULARY, 2).encode("the red cube")


def test_an_empty_vocabulary_ignores_the_instruction():
    assert Tokenizer((), 3).encode("anything").tolist() == [0, 0, 0]
