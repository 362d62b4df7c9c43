"""The verbs of the command line: one file a verb, whose `command` is a click command; the file name is the verb."""
