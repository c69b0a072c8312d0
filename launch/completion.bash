# Tab completion of recipes, groups and keys, after python, deepspeed or torchrun:
#   source launch/completion.bash            (zsh: autoload -U bashcompinit && bashcompinit first)

_finetune_complete() {
  local line="${COMP_LINE:0:COMP_POINT}" word script="" words
  read -ra words <<< "$line"
  for word in "${words[@]}"; do
    case "$word" in */launch/*.py | launch/*.py) script="$word" ;; esac
  done
  [ -f "$script" ] || { COMPREPLY=($(compgen -o default -- "${COMP_WORDS[COMP_CWORD]}")); return; }
  # Hydra wants the line as if Python alone had started the script.
  local settings="${line#*"$script"}" current="${line##* }"
  local choices
  choices=$(COMP_LINE="python $script$settings" python "$script" -sc query=bash 2> /dev/null)
  COMPREPLY=($(compgen -W "$choices" -- "$current"))
}

# Without this, bash would break words at "=" and ":".
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]/}
complete -o nospace -o default -F _finetune_complete python python3 deepspeed torchrun
