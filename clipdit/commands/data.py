"""`clipdit data ...`: make a data folder, and check one."""

from clipdit.commands.data_check import check
from clipdit.commands.data_emoji import emoji

VERBS = {"emoji": emoji, "check": check}
