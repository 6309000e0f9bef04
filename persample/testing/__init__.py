"""What persample is tried and measured with: the loop, cases, other libraries and the commands.

`persample.testing.cases` is public: models with a batch, for tests of one's own. The rest is private.
"""
