"""Speed, memory and accuracy of the losses beside their peers. One file a question; `make bench` asks them all."""
