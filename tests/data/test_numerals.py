"""Numbers in any script: found where they are, changed to another number of the same form, never to the same value."""

import random
import unicodedata

import pytest
from dpop_trainer.measure.matchers import matches_choice, matches_number
from dpop_trainer.measure.numerals import HAN_NUMBER, change_one_digit, in_ascii
from dpop_trainer.tools.pairs.edit import number_places
from dpop_trainer.tools.pairs.metamath import corrupt_intermediate_result


def value(number):
    """What a number is worth, whatever its digits; Python reads them itself, the marks between them it does not."""
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in number)
    return float(plain.replace("，", "").replace(",", "").replace("٬", "").replace("٫", ".").replace("．", "."))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("共有24个苹果，花了3.5元", ["24", "3.5"]),  # no space stands between a word and a number
        ("他有１２个，付了１，２５０．５０元。", ["１２", "１，２５０．５０"]),
        ("１２，３４和５", ["１２", "３４", "５"]),  # commas that separate clauses
        ("价值3万元或1.5亿元，约２０２４年", ["3", "1.5", "２０２４"]),
        ("東京は1,400万人", ["1,400"]),
        ("사과가 24개", ["24"]),
        ("لديه ٢٤ تفاحة و٣٫٥ كغ و١٬٢٥٠", ["٢٤", "٣٫٥", "١٬٢٥٠"]),
        ("יש לו כ-24 תפוחים", ["24"]),
        ("उसके पास २४ सेब और १२,३४,५६७ रुपये", ["२४", "१२,३४,५६७"]),
        ("เขามี24ผลและ ๒๔ ผล", ["24", "๒๔"]),
        ("₹1,23,456 and 12,345,678", ["1,23,456", "12,345,678"]),
        ("x1, naïve2, м3, β4 are names, 5 is not", ["5"]),
        ("1.2.3, 1.234,56 and 3,5 are left alone", []),  # another notation than this rule's
        ("一共有二十四个，两百三十万人，第一次，万一，十分", ["二十四", "两百三十万"]),
    ],
)
def test_the_number_rule_reads_every_script(text, numbers):
    for seed in range(20):
        places = sorted(number_places(text, random.Random(seed)))
        assert [text[place.start : place.end] for place in places] == numbers
        for place, number in zip(places, numbers, strict=True):
            (replacement,) = place.replacements
            assert len(replacement) == len(number)
            assert sum(a != b for a, b in zip(number, replacement, strict=True)) == 1
            if HAN_NUMBER.fullmatch(number):
                assert HAN_NUMBER.fullmatch(replacement)
            else:
                assert value(replacement) != value(number)


@pytest.mark.parametrize(("zero", "number"), [("0", "24"), ("０", "２４"), ("٠", "٢٤"), ("०", "२४"), ("๐", "๒๔")])
def test_a_digit_becomes_one_of_its_own_script(zero, number):
    replacements = {change_one_digit(number, random.Random(seed)) for seed in range(1000)}
    digits = [chr(ord(zero) + digit) for digit in range(10)]
    # the leading digit 2 may become any but 0 and 2, the other one any but 4
    leading = {digits[d] + digits[4] for d in (1, 3, 4, 5, 6, 7, 8, 9)}
    assert replacements == leading | {digits[2] + digits[d] for d in (0, 1, 2, 3, 5, 6, 7, 8, 9)}


def test_ascii_stands_where_the_text_stood():
    text = "共１２个＝３．５＋４（个），ＡＢ：٣٫٥٪ ½ x² 👩‍👩‍👧 ①"
    assert in_ascii(text) == "共12个=3.5+4(个)，AB：3.5٪ ½ x² 👩‍👩‍👧 ①"
    assert len(in_ascii(text)) == len(text)


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        ("五月卖了48÷2=24(个)。\n一共48+24=72(个)。\n#### 72", "24"),  # a unit in brackets, no product
        ("五月卖了４８÷２＝２４（个）。\n一共４８＋２４＝７２（个）。\n答案是７２。", "２４"),
        ("باع ٤٨ ÷ ٢ = ٢٤ مشبكا.\nالمجموع ٤٨ + ٢٤ = ٧٢.\nالإجابة هي ٧٢", "٢٤"),
        ("उसने ४८/२ = २४ बेचे। कुल ४८+२४ = ७२।\n#### ७२", "२४"),
        ("Ella vendió 48/2 = 24. En total 48+24 = 72. La respuesta es 72 = 72.", "24"),
        ("10×3000 = 30000 = 3万，3万+1万 = 4万", None),
        ("共3×4=12x+5", ""),  # goes on
    ],
)
def test_intermediate_results_in_every_script(answer, first):
    found = set()
    for seed in range(40):
        corruption = corrupt_intermediate_result(answer, random.Random(seed))
        if first == "":
            assert corruption is None
            continue
        assert corruption is not None
        rejected, start, end, original, replacement = corruption
        assert rejected == answer[:start] + replacement + answer[end:]
        assert value(replacement) != value(original)
        assert all(
            unicodedata.name(a).split()[0] == unicodedata.name(b).split()[0]
            for a, b in zip(original, replacement, strict=True)
        )
        found.add(original)
    if first is None:
        assert found == {"30000", "3"}  # never the last result, 4万
    elif first:
        assert found == {first}


@pytest.mark.parametrize(
    ("sample", "label", "verdict"),
    [
        ("48+24=72。答案是72。", "#### 72", True),
        ("答案：７２", "72", True),
        ("答案为 ٧٢", "72", True),
        ("答えは1,400です", "1400", True),
        ("정답은 73", "72", False),
        ("الإجابة هي ٧٣", "٧٢", False),
        ("La respuesta es 72", "#### 72", True),
        ("Die Antwort ist 73.", "#### 72", False),
        ("答案是3万", "30000", True),
        ("答案是1.5亿", "#### 150000000", True),
        ("答案是3万5千", "35000", None),  # not read, and so no mistake to learn from
        ("答案是七十二，因为48+24=72", "72", None),
        ("答案是五，因为2+3=5", "5", None),
        ("48+24=73", "72", None),
        ("The answer is 48+24 = 72.", "72", True),  # what the equation comes to
        ("答：一共卖了４８＋２４＝７２（个）。", "72", True),
        ("the answer is (48 + 24) / 2 = 36", "36", True),
        ("The answer is 72, because 48+24 = 72 and 2*3 = 6", "72", True),
        ("The answer is 5-10", "5", True),
        ("回答：48÷2=24，所以…", "72", None),  # a heading, not the final answer
    ],
)
def test_final_numbers_in_every_script(sample, label, verdict):
    assert matches_number(sample, label) is verdict


@pytest.mark.parametrize(
    ("sample", "verdict"),
    [
        ("答案是B", True),
        ("答案是（Ｂ）", True),
        ("B、因为…", True),
        ("Ａ．不", False),
        ("答案：C。", False),
        ("Bравда", None),
    ],
)
def test_choices_beside_letters_of_other_scripts(sample, verdict):
    assert matches_choice(sample, "B") is verdict
