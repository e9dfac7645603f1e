"""The microscope: what a kernel becomes on a chip, and the most that the chip could do with it.

No GPU and no driver is needed. From the compiler up:

    build.py      a kernel compiled by Triton or nvcc, with its machine code, resources and launch
    sass.py       machine code as instructions: pipes, widths of memory accesses, loops
    schedule.py   how long one warp takes through them, from the waits that the compiler wrote into them
    addresses.py  which bytes the threads of a warp touch: coalescing and bank conflicts
    occupancy.py  how many blocks fit an SM, and why no more
    bounds.py     the least time for the work, by pipe, bandwidth and latency; the largest is the ceiling
    findings.py   what is wrong with a kernel, by name
    report.py     all of that as text; page.py as one HTML page
    table.py      the record of what is shipped, which tests compare with
    command.py    `fastgpt inspect`
"""
