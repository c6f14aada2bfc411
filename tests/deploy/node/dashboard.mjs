// Prints what Grafana's own types find wrong with the dashboard of the file that is named, a finding a line.
import { readFileSync, writeFileSync } from "node:fs";
import ts from "typescript";

const dashboard = JSON.parse(readFileSync(process.argv[2]));
const schema = "./node_modules/@grafana/schema/dist";
const kinds = { timeseries: "TimeSeries", stat: "Stat", heatmap: "Heatmap" };

// Its enumerations are strings in JSON. All options of a panel have defaults.
const lines = [
  `import type { Dashboard, Panel, VariableModel } from "${schema}/types/raw/dashboard/x/types.gen";`,
  ...Object.entries(kinds).map(([kind, name]) => `import type * as ${kind} from "${schema}/esm/raw/composable/${kind}/panelcfg/x/${name}PanelCfg_types.gen";`),
  "type Json<T> = T extends string ? `${T}` : T extends (infer U)[] ? Json<U>[] : T extends object ? { [K in keyof T]: Json<T[K]> } : T;",
];
const check = (type, value) => lines.push(`export const value${lines.length}: ${type} = ${JSON.stringify(value)};`);

check("Json<Dashboard>", dashboard);
dashboard.templating.list.forEach((variable) => check("Json<VariableModel>", variable));
for (const panel of dashboard.panels.filter(({ type }) => type !== "row")) {
  check("Json<Panel>", panel);
  check(`Partial<Json<${panel.type}.Options>>`, panel.options);
  if (panel.fieldConfig.defaults.custom) check(`Json<${panel.type}.FieldConfig>`, panel.fieldConfig.defaults.custom);
}
writeFileSync("dashboard.ts", lines.join("\n"));
const options = { module: ts.ModuleKind.NodeNext, noEmit: true, skipLibCheck: true, strict: true, types: [] };
for (const found of ts.getPreEmitDiagnostics(ts.createProgram(["dashboard.ts"], options))) {
  console.log(ts.flattenDiagnosticMessageText(found.messageText, " "));
}
