"""Tests of what goes into the collection and what comes out of it."""
import tempfile
import unittest
from pathlib import Path

from indexer import sections
from rag_app import best


class RetrievalTest(unittest.TestCase):
    def test_sections_are_prose_with_their_titles(self):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            (root / "docs").mkdir()
            (root / "README.md").write_text(
                "# Gate\n\nshort\n\n## Why\n\n" + "word " * 200 + "\n```\n# not a title\n```\n")
            (root / "docs" / "a.md").write_text("# Doors\n\nThere are two doors, of which one opens at a time.\n")
            found = list(sections(root))
        self.assertEqual([(where, title) for where, title, _ in found], [("README.md#1", "Why"), ("docs/a.md#0", "Doors")])
        self.assertEqual(len(found[0][2]), 400)

    def test_best_shares_most_words_with_the_question(self):
        found = [("Names", "what they are"), ("Grants", "a grant names callers"), ("Doors", "two doors")]
        self.assertEqual(best("What does a grant name?", found), [found[1], found[0]])


if __name__ == "__main__":
    unittest.main()
