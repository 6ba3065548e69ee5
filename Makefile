# make demo: see it work (4 to 8 minutes on 2 free cores after the install). make test: check that it does.
# make site: README, RESULTS.md and the executed notebooks as pages. make student: notebooks with gaps;
# make solved: the same with the gaps filled.
# make -j3 experiments: run what RESULTS.md lacks, seeds side by side; FLAGS="--only table3" for one.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint notebooks experiments site student solved clean

demo: .venv/ready
	$(BIN)/python notebooks/execute.py

test: .venv/ready
	$(BIN)/python -m pip install -q -r tests/requirements.txt -c constraints.txt
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/python -m pip install -q ruff -c constraints.txt
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

notebooks: .venv/ready
	$(BIN)/python docs/lines.py
	$(BIN)/python notebooks/execute.py --update

site: .venv/ready
	$(BIN)/python -m pip install -q -r docs/requirements.txt -c constraints.txt
	$(BIN)/python docs/build.py

student: .venv/ready
	$(BIN)/python docs/student.py

solved: .venv/ready
	$(BIN)/python docs/student.py --solved

experiments: seed-0 seed-1 seed-2 seed-3 seed-4

seed-%: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python experiments/run.py --seeds $* $(FLAGS)

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into .venv: some minutes, 6 GB on Linux"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv runs/demo figures site student solved
