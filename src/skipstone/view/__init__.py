"""The live page, on which a model continues what is typed and every token shows which blocks computed it.

live_model.py   `LiveModel`: a loaded model; one event for each pass over the prompt or over a token
attention_of_token.py  what a token attends to, by one more pass over the text up to it
live_session.py a request from the page, checked; events of several models and dense ones of their shapes, in turns
saved_page.py   the page as one file that opens offline, and the same for a prompt without a browser
work_queue.py   one request computes at a time, a few wait, and further ones are refused
server.py       the pages and answers, and the checks of every request
serving.py      `serve`: the server on loopback until it is stopped
static/         the page itself: HTML, CSS and JavaScript without a build step
"""
