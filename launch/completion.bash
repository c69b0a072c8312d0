# Tab completion of recipes, groups, keys and their values, after python, deepspeed or torchrun:
#   source launch/completion.bash            (zsh: autoload -U bashcompinit && bashcompinit first)

# Every word that may follow launch/PROGRAM.py, one a line. The schemas are read as text: importing Hydra takes a second.
_finetune_words() {
  python3 -SE - "$1" "$2" << 'PYTHON'
import ast, pathlib, sys

root, program = pathlib.Path(sys.argv[1]), sys.argv[2]
classes, bases, programs = {}, {}, {}
for name in ("config", "cli/schemas"):
    for node in ast.parse((root / "finetune" / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            fields = [(item.target.id, ast.unparse(item.annotation)) for item in node.body if isinstance(item, ast.AnnAssign)]
            bases[node.name] = [ast.unparse(base) for base in node.bases]
            classes[node.name] = fields + [field for base in bases[node.name] for field in classes.get(base, [])]
        elif isinstance(node, ast.Assign) and node.targets[0].id == "SCHEMAS":
            programs = {key.value: value.id for key, value in zip(node.value.keys, node.value.values)}
choices = {name: [item.targets[0].id for item in node.body if isinstance(item, ast.Assign)]
           for node in ast.parse((root / "finetune/config.py").read_text(encoding="utf-8")).body
           if isinstance(node, ast.ClassDef) and bases[node.name] == ["Enum"] for name in [node.name]}


def kinds(name):
    """The classes at the ends of a class's tree; itself if nothing inherits from it."""
    children = [child for child, parents in bases.items() if name in parents]
    return [kind for child in children for kind in kinds(child)] or [name]


def keys(name, prefix=""):
    for field, kind in classes[name]:
        kind = kind.removeprefix("Optional[").rstrip("]")
        if kind in choices:
            yield from (f"{prefix}{field}={choice}" for choice in choices[kind])
        elif kind == "bool":
            yield from (f"{prefix}{field}={choice}" for choice in ("true", "false"))
        elif kind in classes:
            for section in kinds(kind):
                yield from keys(section, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}="


words = set(keys(programs[program])) if program in programs else set()
groups = [path for path in (root / "conf").iterdir() if path.is_dir()] if program in ("train", "plan") else []
groups += [root / "conf/task"] if program == "evaluate" else []
words |= {f"{folder.name}={path.stem}" for folder in groups for path in folder.glob("*.yaml")}
words |= {f"recipe={path.stem}" for path in (root / "recipes").glob("**/*.yaml")} if program in ("train", "plan") else set()
words |= {"model=" if word == "export_dir=" else word for word in words} - {"export_dir="} if "export_dir=" in words else set()
print("\n".join(sorted(words - {"export_dir="})))
PYTHON
}

_finetune_complete() {
  local line="${COMP_LINE:0:COMP_POINT}" word script="" words
  read -ra words <<< "$line"
  for word in "${words[@]}"; do
    case "$word" in */launch/*.py | launch/*.py) script="$word" ;; esac
  done
  local current="${line##* }"
  [ -f "$script" ] || { COMPREPLY=($(compgen -o default -- "${COMP_WORDS[COMP_CWORD]}")); return; }
  COMPREPLY=($(compgen -W "$(_finetune_words "$(dirname "$script")/.." "$(basename "$script" .py)")" -- "$current"))
  # A value that is none of the known ones may be a path.
  case "$current" in
    *=*) [ ${#COMPREPLY[@]} -gt 0 ] && [ "${COMPREPLY[0]}" != "$current" ] || {
           local IFS=$'\n'
           COMPREPLY=($(compgen -P "${current%%=*}=" -f -- "${current#*=}"))
         } ;;
  esac
}

# Without this, bash would break words at "=" and ":".
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]/}
complete -o nospace -o default -F _finetune_complete python python3 deepspeed torchrun
