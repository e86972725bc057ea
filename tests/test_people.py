"""dev/people.py counts what captions say wrongly of people."""
from dev import people
from helpers import one_line_error, run


def record(caption, *references):
    return caption, list(references)


def test_contradictions_are_counted():
    records = [
        record("A man in a red shirt .", "A woman in a blue shirt .", "A lady ."),  # both wrong
        record("A man in a red hat .", "A woman and a man in a red dark hat ."),  # both right
        record("A dog .", "A woman ."),  # says nothing
        record("An Asian boy in gray pants .", "A child ."),  # the reference does not tell
    ]
    assert people.count(records, people.gender) == (2, 1)
    assert people.count(records, people.clothes) == (2, 1)
    assert people.count(records, people.age) == (3, 0)
    assert people.count(records, people.skin) == (0, 0)
    assert people.skin("An Asian boy and a black dog") == {"asian boy"}
    assert people.clothes("a grey and a red striped shirt") == {"red"}


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "captions.jsonl"
    for text in ("no JSON", '{"image": "a.jpg", "caption": "A dog ."}', "[1]"):
        path.write_text(text)
        done = run("dev/people.py", path, check=False)
        one_line_error(done, 2, str(path), "JSON lines of sample.py")
