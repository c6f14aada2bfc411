// Reads a JSON list of custom resources from standard input and prints what is wrong with them, a finding a line: by their schemas, and by
// their types, since the schemas let unknown fields pass.
import { readFileSync, writeFileSync } from "node:fs";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import ts from "typescript";

const modules = {
  "@kubernetes-models/keda/keda.sh/v1alpha1": keda,
  "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1": prometheus,
};

const objects = JSON.parse(readFileSync(0)).map((object) => {
  const [module, models] = Object.entries(modules).find(([, models]) => models[object.kind]?.apiVersion === object.apiVersion) ?? [];
  return { object, module, Model: models?.[object.kind] };
});

for (const { object, Model } of objects) {
  try {
    if (Model === undefined) throw new Error(`no such kind in ${object.apiVersion}`);
    new Model(object).validate();
  } catch (error) {
    console.log(`${object.kind}: ${error.message}`);
  }
}

const known = objects.filter(({ Model }) => Model !== undefined);
const source = known.map(({ object, module }, index) => `
import type { I${object.kind} as Kind${index} } from "${module}";
export const ${object.kind}${index}: Kind${index} = ${JSON.stringify(object, null, 1)};`);
writeFileSync("objects.ts", source.join(""));
const options = { module: ts.ModuleKind.NodeNext, noEmit: true, skipLibCheck: true, strict: true, types: [] };
for (const found of ts.getPreEmitDiagnostics(ts.createProgram(["objects.ts"], options))) {
  const line = ts.getLineAndCharacterOfPosition(found.file, found.start).line;
  const text = found.file.text.split("\n")[line].trim();
  console.log(`${text} ${ts.flattenDiagnosticMessageText(found.messageText, " ")}`);
}
