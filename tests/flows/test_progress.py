from flows.progress import from_output


def test_a_line_of_output_moves_the_progress_of_what_it_names():
    seen = []
    listen = from_output(lambda *said: seen.append(said))
    listen("12,800/40,000 images  27.9/s  0:02 left")
    listen("1/4 truncations")
    listen("3 / 5")
    listen("nothing to count")
    assert seen == [("images", 12800, 40000), ("truncations", 1, 4), ("done", 3, 5)]
