"""One file a kind of data that people bring, and below them what opens files and tells what is wrong with them."""
