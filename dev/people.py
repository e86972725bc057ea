"""
Counts what captions get wrong about people, judged by the references.

    python sample.py --image data/flickr8k-320 --json --dtype float32 > captions.jsonl
    python dev/people.py captions.jsonl

A caption that names something, such as a color of clothes, contradicts the references if they only
name others. It is not counted if they name none.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanocaption.cli import Parser, run

MALE = "man men boy boys guy guys male gentleman he his him"
FEMALE = "woman women girl girls lady ladies female she her"
CHILD = "boy boys girl girls child children kid kids baby toddler"
ADULT = "man men woman women guy guys lady ladies gentleman adult adults"
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gray|grey"
CLOTHES = "shirt|shirts|t-shirt|jacket|coat|hat|cap|dress|shorts|pants|jeans|uniform|suit|sweater"
SKIN = r"\b(?:black|white|brown|dark|asian|african|african-american|indian|hispanic) " \
       r"(?:man|men|woman|women|boy|boys|girl|girls|child|children|person|people|lady|guy)\b"


def find_words(text, **groups):
    """The names of the groups, each "word word ...", that have a word in the text."""
    words = set(re.findall(r"[\w-]+", text.lower()))
    return {name for name, group in groups.items() if words & set(group.split())}


def gender(text):
    """Whether a text names males or females: {"male"}, {"female"}, both or none."""
    return find_words(text, male=MALE, female=FEMALE)


def age(text):
    """Whether a text names children or adults."""
    return find_words(text, child=CHILD, adult=ADULT)


def clothes(text):
    """The colors of clothes in a text, such as {"red"}."""
    pattern = rf"\b({COLORS}) (?:\w+ )?(?:{CLOTHES})\b"
    return {color.replace("grey", "gray") for color in re.findall(pattern, text.lower())}


def skin(text):
    """What a text says about people's skin or origin, such as {"asian man"}."""
    return set(re.findall(SKIN, text.lower()))


def count(records, find):
    """
    How many captions can be checked with find, and how many contradict their references. records:
    a list of (caption, references).
    """
    checked = 0
    wrong = 0
    for caption, references in records:
        said = find(caption)
        true = set().union(*(find(text) for text in references))
        if said and true:
            checked += 1
            wrong += not said & true
    return checked, wrong


def read_record(line):
    """A line that sample.py --json printed -> its first caption and the references."""
    record = json.loads(line)
    return record["captions"][0]["text"], record["references"]


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("captions", help="what sample.py --json printed")
    path = parser.parse_args().captions
    try:
        with open(path, encoding="utf-8") as file:
            records = [read_record(line) for line in file]
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{path}: expected the JSON lines of sample.py --json ({error})")
    for name, find in (("gender", gender), ("age", age), ("clothes", clothes), ("skin", skin)):
        checked, wrong = count(records, find)
        print(f"{name:8} {checked:4} captions, {wrong:3} contradict the references")
    # how often the caption names the wrong gender
    for true, said in (("female", "male"), ("male", "female")):
        images = 0
        wrong = 0
        for caption, references in records:
            found = gender(caption)
            if set().union(*(gender(text) for text in references)) == {true}:
                images += bool(found)
                wrong += found == {said}
        print(f"only {true} in the references, caption says only {said}: {wrong} of {images}")
    print("captions that mention skin or origin:",
          sum(bool(skin(caption)) for caption, _ in records))


if __name__ == "__main__":
    run(main)
