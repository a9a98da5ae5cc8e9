// What is chosen, told to whoever shows it when it changes. Each page says what there is to choose, in `chosen`.

const listeners = [];

// `listener` runs after every change, with the names of what changed.
const onChange = (listener) => listeners.push(listener);

function choose(changes) {
  const changed = new Set(Object.keys(changes).filter((name) => chosen[name] !== changes[name]));
  if (!changed.size) return;
  Object.assign(chosen, changes);
  for (const listener of listeners) listener(changed);
}

function bindSelect(id, name, entries) {
  const select = $(id);
  options(select, entries, chosen[name]);
  select.addEventListener("change", () => choose({ [name]: Number(select.value) }));
  onChange((changed) => { if (changed.has(name)) select.value = chosen[name]; });
}
