"""A table of what is where, kept on disk, so that a million records cost no memory to speak of."""

import sqlite3

from common.cli import UserError

# pages that SQLite may hold in memory; the rest is in a temporary file that vanishes with the process
CACHE_KIB = 16384


class Index:
    """Maps keys (texts or integers) to pairs of integers, like a dict that lives in a temporary file.

    Raises:
        UserError: the temporary file cannot be written (its folder is TMPDIR, else /var/tmp).
    """

    def __init__(self):
        self._database = sqlite3.connect("", isolation_level=None)  # "": a private temporary file
        self._count = 0
        for statement in (
            f"PRAGMA cache_size = -{CACHE_KIB}",
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE places (key PRIMARY KEY, a INTEGER, b INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._run(statement)

    def _run(self, statement, values=()):
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"cannot keep the table of records in a temporary file: {error}; give TMPDIR=… a folder with "
                "room"
            ) from None

    def __setitem__(self, key, pair):
        before = self._database.total_changes
        self._run("INSERT OR IGNORE INTO places VALUES (?, ?, ?)", (key, *pair))
        if self._database.total_changes > before:
            self._count += 1
        else:
            self._run("UPDATE places SET a = ?, b = ? WHERE key = ?", (*pair, key))

    def get(self, key):
        """The pair of a key, or None."""
        return self._run("SELECT a, b FROM places WHERE key = ?", (key,)).fetchone()

    def __getitem__(self, key):
        pair = self.get(key)
        if pair is None:
            raise KeyError(key)
        return pair

    def __contains__(self, key):
        return self.get(key) is not None

    def __len__(self):
        return self._count

    def __iter__(self):
        """The keys, sorted."""
        return (key for [key] in self._run("SELECT key FROM places"))

    def count(self, key):
        """How often `key` was counted before this call; counts it once more. Not to be mixed with pairs."""
        [before] = self._run(
            "INSERT INTO places VALUES (?, 0, 0) ON CONFLICT (key) DO UPDATE SET a = a + 1 RETURNING a",
            (key,),
        ).fetchone()
        return before
